"""What the engine takes on this machine for each product at each pair of bits: measured inside of whole models."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from qvit import _kernels
from qvit.bench.compare import ROUNDS, interleaved, time_once
from qvit.bench.random_model import random_model
from qvit.config import Bits
from qvit.format.branches import Mlp, Residual
from qvit.format.program import Program
from qvit.runtime.engine import Engine
from qvit.search.products import CANDIDATES, FreeProduct

_REFERENCE = Bits(8, 8)
_COUNTED = 2
"""Bits of inputs up to which the engine takes the activation function before them by comparing."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one image.

    Args:
        reference: of the model with 8 bits for all free products.
        differences: how much longer each product takes than with 8 bits, by its name and bits.
        threads: of the engine.
        instruction_set: of the engine.
    """

    reference: float
    differences: dict[str, dict[Bits, float]]
    threads: int
    instruction_set: str

    def whole(self, bits: Mapping[str, Bits]) -> float:
        """Return the time of a model, by the bits of every free product."""
        return self.reference + sum(self.differences[name][pair] for name, pair in bits.items())


class Stopwatch:
    """Times models of one program with random weights, which differ in the bits of the free products.

    Args:
        program: of the model, at any bits.
        products: whose bits are free.
        threads: of the engine; ``None`` for as many as this process may use.
    """

    def __init__(self, program: Program, products: Sequence[FreeProduct], threads: int | None) -> None:
        self.program, self.products, self.threads = program, products, threads
        self.reference = self._engine({product.name: _REFERENCE for product in products})
        self.image = np.random.default_rng(0).standard_normal((1, *program.input), np.float32)

    def times(self, report: Callable[[int, int], None]) -> Times:
        """Measure what every free product takes at every pair of bits.

        Products of one kind and size change together, from a model of 8 bits, for each way in which the engine computes
        them: turn by turn with that model, so that what the machine does meanwhile meets both alike. Pairs of bits
        that are computed in one way have one time.

        Args:
            report: called with how many of how many comparisons are done.
        """
        groups: dict[Hashable, list[FreeProduct]] = {}
        for product in self.products:
            groups.setdefault(self._kind(product), []).append(product)
        ways = {kind: {pair: self._way(group[0], pair) for pair in CANDIDATES} for kind, group in groups.items()}
        todo = sum(len({*of.values()} - {of[_REFERENCE]}) for of in ways.values())
        references: list[float] = []
        done = 0
        differences: dict[str, dict[Bits, float]] = {}
        for kind, group in groups.items():
            by_way = {ways[kind][_REFERENCE]: 0.0}
            for pair, way in ways[kind].items():
                if way not in by_way:
                    bits = {product.name: _REFERENCE for product in self.products}
                    bits |= {product.name: pair for product in group}
                    own, other = self._compare(bits)
                    references += own
                    by_way[way] = (min(other) - min(own)) / len(group)
                    done += 1
                    report(done, todo)
            for product in group:
                differences[product.name] = {pair: by_way[way] for pair, way in ways[kind].items()}
        if not references:
            references = self._compare({})[0]
        engine = self.reference
        return Times(min(references), differences, engine.threads, engine.instruction_set)

    def measure(self, bits: Mapping[str, Bits]) -> float:
        """Return the milliseconds of a model, by the bits of every free product."""
        return min(self._compare(bits)[1])

    def _compare(self, bits: Mapping[str, Bits]) -> tuple[list[float], list[float]]:
        """Return milliseconds of the model of 8 bits and of another one, turn by turn."""
        engines = {"reference": self.reference, "other": self._engine(bits)}
        timers = {name: functools.partial(time_once, engine, self.image) for name, engine in engines.items()}
        seconds = interleaved(timers, ROUNDS)
        own, other = ([1e3 * each for each in seconds[name]] for name in engines)
        return own, other

    def _engine(self, bits: Mapping[str, Bits]) -> Engine:
        by_name = {product.name: product for product in self.products}
        changed: dict[str, Bits] = {}
        for name, pair in bits.items():
            changed |= by_name[name].program_bits(pair)
        program = self.program.with_bits(changed)
        return Engine(random_model(program), threads=self.threads)

    def _kind(self, product: FreeProduct) -> Hashable:
        """Return what products have in common that take the same time.

        After the last attention's keys and values are made, a model that looks at its class token alone computes no
        other row.
        """
        names = [each.name for each in self.program.products()]
        last = max((place for place, name in enumerate(names) if name.endswith(".qkv")), default=len(names))
        layer = self.program.layers().get(product.name)
        role = re.sub(r"\b\d+\b", "", product.name)
        return role, product.macs, layer and layer.inputs, names.index(product.name) > last

    def _way(self, product: FreeProduct, bits: Bits) -> tuple[str, bool]:
        """Return in which way the engine computes a product."""
        kernel = _kernels.product(
            self.reference.instruction_set, bits.activation, bits.weight, moving=not product.is_layer
        )
        after = {
            branch.fc2.name
            for operation in self.program.operations
            if isinstance(operation, Residual)
            for branch in operation.branches
            if isinstance(branch, Mlp)
        }
        return kernel, product.name in after and bits.activation <= _COUNTED
