"""A network as a straight line of operations over one stream of tokens, checked as a whole. No PyTorch here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qvit.config import Bits
from qvit.errors import PackedFileError
from qvit.format.branches import Attention, AttentionPool, Residual, Rotary
from qvit.format.fields import MAX_SIZE, is_whole, need, plain, read_record, read_text, shown, unknown
from qvit.format.ops import (
    OPERANDS,
    Classify,
    Embed,
    Entry,
    Layer,
    Merge,
    Norm,
    Operation,
    Pool,
    Product,
    Stream,
    Tokens,
)

MAX_PIXELS = 2**26
"""Largest number of values in one image, so that a header alone cannot ask for a huge one."""
OPERATIONS: dict[str, type[Operation]] = {
    kind.op: kind for kind in (Embed, Tokens, Norm, Residual, Merge, Pool, AttentionPool, Classify)
}
"""Every operation by its name in the file."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a packed model computes.

    Args:
        name: timm's name or class name of the model, for people.
        input: of one image, (channels, height, width).
        operations: in the order they run.

    Raises:
        PackedFileError: naming the operation and the field that does not fit what flows in.
    """

    name: str
    input: tuple[int, int, int]
    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        channels, height, width = self.input
        for side in self.input:
            need(
                is_whole(side, 1, MAX_SIZE), "input", f"it must be three numbers from 1 to {MAX_SIZE}, not {self.input}"
            )
        pixels = channels * height * width
        need(pixels <= MAX_PIXELS, "input", f"an image of {pixels} values is beyond the limit of {MAX_PIXELS}")
        last = self.streams[-1].stage
        need(last in ("vectors", "logits"), "program", "it must end with a pool or with classifiers")
        names = Counter(name for name, *_ in self._named_entries())
        for name, count in names.items():
            need(count == 1, "program", f"two of its parts are called {shown(name)}")
        shared: dict[str, Any] = {}
        for rotary, shape in self._rotaries():
            need(shared.setdefault(rotary.name, shape) == shape, "program", f"two tables are called {rotary.name!r}")

    @functools.cached_property
    def streams(self) -> tuple[Stream, ...]:
        """What flows into each operation, and out of the last."""
        streams = [Stream("image", 0, self.input[0], self.input[1:])]
        for index, operation in enumerate(self.operations):
            place, x = f"program[{index}]", streams[-1]
            fits = x.stage in operation.takes
            need(fits, place, f"{operation.op!r} takes {' or '.join(operation.takes)}, and here flow {x.stage}")
            streams.append(operation.after(x, place))
        return tuple(streams)

    def walk(self) -> Iterator[tuple[Operation, Stream]]:
        """Return every operation with what flows into it."""
        return zip(self.operations, self.streams, strict=False)

    @property
    def output(self) -> int:
        """Length of what comes out: logits, or, without classifiers, the pooled vectors one after the other."""
        last = self.streams[-1]
        return last.tokens * last.width

    @property
    def classifies(self) -> bool:
        """Whether logits come out; otherwise it is a feature extractor."""
        return self.streams[-1].stage == "logits"

    def entries(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Return dtype and shape of every tensor of the file, by name."""
        entries = {}
        for operation, x in self.walk():
            for name, dtype, shape in operation.entries(x):
                entries[name] = dtype, shape
        return entries

    def layers(self) -> dict[str, Layer]:
        """Return every linear layer by name, in the order they run."""
        return {layer.name: layer for operation in self.operations for layer in operation.layers()}

    def bits(self) -> dict[str, Bits]:
        """Return the bits of every layer and of every operand of an attention product, whose two are the same."""
        bits: dict[str, Bits] = {}
        for operation in self.operations:
            bits.update((layer.name, layer.bits) for layer in operation.layers())
            bits.update((name, Bits(width, width)) for name, width in operation.operands())
        return bits

    def with_bits(self, bits: Mapping[str, Bits]) -> Program:
        """Return the same program with other bits for some of the names that :meth:`bits` gives."""

        def changed(part: Any) -> Any:
            if isinstance(part, list):
                return [changed(value) for value in part]
            if not isinstance(part, dict):
                return part
            made = {field: changed(value) for field, value in part.items()}
            if "bits" in part:
                made["bits"] = list(bits.get(part["name"], part["bits"]))
            for operand in OPERANDS:
                if f"{part.get('name')}.{operand}" in bits:
                    made[operand] = bits[f"{part['name']}.{operand}"].activation
            return made

        return read_program(self.name, list(self.input), changed(self.to_list()))

    def usual_bits(self) -> Bits:
        """Return the bits that most layers and operands have."""
        return Counter(self.bits().values()).most_common(1)[0][0]

    def products(self) -> list[Product]:
        """Return the multiply-adds of one image, product by product."""
        return [product for operation, x in self.walk() for product in operation.products(x)]

    def macs(self) -> dict[Bits, int]:
        """Return the multiply-adds of one image by the bits of their factors: keys and values stand for weights."""
        counts: Counter[Bits] = Counter()
        for product in self.products():
            counts[product.bits] += product.macs
        return dict(sorted(counts.items()))

    def attentions(self) -> dict[str, tuple[Attention | AttentionPool, Stream]]:
        """Return every attention by name, with what flows into it."""
        found: dict[str, tuple[Attention | AttentionPool, Stream]] = {}
        for operation, x in self.walk():
            parts = operation.branches if isinstance(operation, Residual) else (operation,)
            found.update((part.name, (part, x)) for part in parts if isinstance(part, (Attention, AttentionPool)))
        return found

    def _rotaries(self) -> Iterator[tuple[Rotary, tuple[int, ...]]]:
        for attention, x in self.attentions().values():
            if isinstance(attention, Attention) and attention.rotary is not None:
                yield attention.rotary, (attention.rotary.heads, x.tokens - x.prefix, attention.head_dim)

    def _named_entries(self) -> Iterator[Entry]:
        """Yield every entry but the rotation tables, which several attentions may share."""
        shared = {f"{rotary.name}.{part}" for rotary, _ in self._rotaries() for part in ("cos", "sin")}
        for operation, x in self.walk():
            yield from (entry for entry in operation.entries(x) if entry[0] not in shared)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the operations as plain data for the file's header; :func:`read_program` reads them back."""
        return [{"op": operation.op, **plain(operation)} for operation in self.operations]

    def computation(self) -> list[dict[str, Any]]:
        """Return the operations as plain data without names, bits and rectifiers: what a float model would compute."""
        left_out = {"name", "bits", "rectifier", *OPERANDS}

        def rest(part: Any) -> Any:
            if isinstance(part, dict):
                return {name: rest(value) for name, value in part.items() if name not in left_out}
            return [rest(value) for value in part] if isinstance(part, list) else part

        return [rest(operation) for operation in self.to_list()]


def first_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """Return from which operation on two programs, as plain data, differ, in words that follow "from"; or nothing."""
    for index, pair in enumerate(itertools.zip_longest(first, second)):
        if pair[0] != pair[1]:
            operation = pair[0] or pair[1]
            return f"operation {index + 1} on, {operation['op']!r}"
    return ""


def read_program(name: Any, size: Any, data: Any) -> Program:
    """Return the program of a header's ``name``, ``input`` and ``program``.

    Raises:
        PackedFileError: naming the operation and the field that is absent, unknown or cannot be meant.
    """
    name = read_text("name", name)
    whole = isinstance(size, list) and len(size) == 3 and all(is_whole(side, 1, MAX_SIZE) for side in size)
    need(whole, "input", f"it must be channels, height and width, not {shown(size)}")
    need(isinstance(data, list) and bool(data), "program", f"it must be a list of operations, not {shown(data)}")
    operations = tuple(_read_operation(f"program[{index}]", entry) for index, entry in enumerate(data))
    return Program(name, (size[0], size[1], size[2]), operations)


def _read_operation(place: str, data: Any) -> Operation:
    need(
        isinstance(data, dict) and isinstance(data.get("op"), str), place, f"it must be an operation, not {shown(data)}"
    )
    kind = OPERATIONS.get(data["op"])
    if kind is None:
        raise PackedFileError(f"{place}: {unknown(OPERATIONS, data['op'])}.")
    return read_record(kind, place, {name: value for name, value in data.items() if name != "op"})
