"""What the engine takes on this machine for each product at each pair of bits: measured inside of whole models."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import statistics
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
_MORE = 8
"""Models that are timed beyond two for each number that is sought."""
Way = tuple[str, bool]
"""Of computing a product: the kernel, and whether the function before it is taken by comparing."""


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

        Products of one kind and size take the same, and pairs of bits that the engine computes in one way. Models in
        which each kind is computed in a way chosen by chance are timed, turn by turn with one of 8 bits, so that what
        the machine does meanwhile meets both alike; what the ways cost is the least-squares solution of all of them.

        Args:
            report: called with how many of how many models are timed.
        """
        groups: dict[Hashable, list[FreeProduct]] = {}
        for product in self.products:
            groups.setdefault(self._kind(product), []).append(product)
        pairs: dict[Hashable, dict[Way, Bits]] = {}  # one for each way; for that of 8 bits these
        for kind, group in groups.items():
            pairs[kind] = {self._way(group[0], pair): pair for pair in (*CANDIDATES[::-1], _REFERENCE)}
        columns = [(kind, way) for kind, ways in pairs.items() for way in ways if ways[way] != _REFERENCE]
        chance, rows, ratios, references = random.Random(0), [], [], []
        models = 2 * len(columns) + _MORE
        for number in range(models):
            ways = {kind: chance.choice(list(of)) for kind, of in pairs.items()}
            if number < len(columns):  # each is seen at least once
                ways |= [columns[number]]
            unchanged, changed = self._compare(
                {p.name: pairs[kind][ways[kind]] for kind in groups for p in groups[kind]}
            )
            rows.append([len(groups[kind]) * (ways[kind] == way) for kind, way in columns])
            ratios.append(min(changed) / min(unchanged))
            references.append(min(unchanged))
            report(number + 1, models)
        solution, *_ = np.linalg.lstsq(np.array(rows, dtype=float), np.array(ratios) - 1)
        reference = statistics.median(references)
        cost = {column: reference * float(factor) for column, factor in zip(columns, solution, strict=True)}
        differences = {
            product.name: {pair: cost.get((kind, self._way(product, pair)), 0.0) for pair in CANDIDATES}
            for kind, group in groups.items()
            for product in group
        }
        return Times(reference, differences, self.reference.threads, self.reference.instruction_set)

    def measure(self, bits: Mapping[str, Bits]) -> float:
        """Return the milliseconds of a model, by the bits of every free product."""
        return min(self._compare(bits)[1])

    def _compare(self, bits: Mapping[str, Bits]) -> tuple[list[float], list[float]]:
        """Return milliseconds of the model of 8 bits and of another one, turn by turn."""
        engines = {"reference": self.reference, "other": self._engine(bits)}
        timers = {name: functools.partial(time_once, engine, self.image) for name, engine in engines.items()}
        seconds = interleaved(timers, ROUNDS)
        unchanged, changed = ([1e3 * second for second in seconds[name]] for name in engines)
        return unchanged, changed

    def _engine(self, bits: Mapping[str, Bits]) -> Engine:
        by_name = {product.name: product for product in self.products}
        changed: dict[str, Bits] = {}
        for name, pair in bits.items():
            changed |= by_name[name].program_bits(pair)
        program = self.program.with_bits(changed)
        return Engine(random_model(program), threads=self.threads)

    def _kind(self, product: FreeProduct) -> Hashable:
        """Return what products have in common that take the same time."""
        layer = self.program.layers().get(product.name)
        return re.sub(r"\b\d+\b", "", product.name), product.macs, layer and layer.inputs

    def _way(self, product: FreeProduct, bits: Bits) -> Way:
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
