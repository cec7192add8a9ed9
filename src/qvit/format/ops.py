"""The operations of a packed file: what each needs, what it gives, and what it refuses. No PyTorch here.

An operation is as large as the unit in which an engine is fast. It is a frozen dataclass whose fields are checked when
they are read (:mod:`qvit.format.fields`); :meth:`Operation.after` checks them against what flows in. What an operation
computes stands in :mod:`qvit.runtime.reference`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from qvit.config import Bits
from qvit.format.fields import (
    MAX_SIZE,
    field,
    list_of,
    need,
    one_of,
    pair_of,
    read_count,
    read_eps,
    read_flag,
    read_layer_bits,
    read_size,
    read_text,
    record_of,
)

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
"""The activation functions of an MLP: one list, from which the file, both engines and the converter take them."""
OPERANDS = ("query", "key", "value", "map")
"""The quantized operands of the two attention products; codes are signed, those of the attention ``map`` unsigned."""
CODES, FLOAT = np.dtype(np.uint8), np.dtype("<f4")

Entry = tuple[str, np.dtype, tuple[int, ...]]
"""A tensor of the file: its name, dtype and shape."""


class Stream(NamedTuple):
    """What flows between two operations.

    Attributes:
        stage: ``image``, ``tokens``, ``vectors`` (pooled) or ``logits``.
        tokens: rows of an image.
        width: values of a row; of an image, its channels.
        grid: rows and columns of patches; of an image, its height and width; (0, 0) where there are none.
        prefix: tokens before the patches.
    """

    stage: str
    tokens: int
    width: int
    grid: tuple[int, int] = (0, 0)
    prefix: int = 0


class Product(NamedTuple):
    """Multiply-adds of one image in one product, by the bits of its factors."""

    name: str
    bits: Bits
    macs: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer on codes; its weight is ``(outputs, inputs)`` (docs/method.md, section 1)."""

    name: str = field(read_text)
    inputs: int = field(read_size)
    outputs: int = field(read_size)
    bits: Bits = field(read_layer_bits)

    def check(self, place: str, inputs: int, outputs: int | None = None) -> None:
        """Refuse other sizes than these."""
        need(self.inputs == inputs, f"{place}.inputs", f"it is {self.inputs}, what flows in has {inputs}")
        if outputs is not None:
            need(self.outputs == outputs, f"{place}.outputs", f"it is {self.outputs}, it must be {outputs}")

    def entries(self) -> Iterator[Entry]:
        """Yield codes, scales and bias, and scale and offset of the inputs."""
        yield f"{self.name}.codes", CODES, (self.outputs, packed_bytes(self.inputs, self.bits.weight))
        yield f"{self.name}.scale", FLOAT, (self.outputs,)
        yield f"{self.name}.bias", FLOAT, (self.outputs,)
        yield f"{self.name}.input_scale", FLOAT, (1,)
        yield f"{self.name}.input_offset", FLOAT, (1,)

    def product(self, rows: int) -> Product:
        """Return its multiply-adds on ``rows`` rows."""
        return Product(self.name, self.bits, rows * self.inputs * self.outputs)


class Operation:
    """A part of a program. Subclasses are frozen dataclasses; ``op`` is their name in the file."""

    op: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ("tokens",)

    def after(self, x: Stream, place: str) -> Stream:
        """Return what flows out where ``x`` flows in.

        Raises:
            PackedFileError: naming the field below ``place`` that does not fit.
        """
        raise NotImplementedError

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield the tensors that it needs."""
        return iter(())

    def layers(self) -> Iterator[Layer]:
        """Yield its linear layers in the order they run."""
        return iter(())

    def operands(self) -> Iterator[tuple[str, int]]:
        """Yield name and bits of its quantized operands that are no layer's input."""
        return iter(())

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield its multiply-adds on one image."""
        for layer in self.layers():
            yield layer.product(x.tokens)


@dataclasses.dataclass(frozen=True)
class Norm(Operation):
    """A normalisation over the last dimension: ``layer`` (mean and variance) or ``rms`` (mean square)."""

    op: ClassVar[str] = "norm"
    takes: ClassVar[tuple[str, ...]] = ("tokens", "vectors")
    name: str = field(read_text)
    kind: str = field(one_of(("layer", "rms")))
    eps: float = field(read_eps)

    def after(self, x: Stream, place: str) -> Stream:
        """Return ``x``: its shape stays."""
        return x

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield weight and bias."""
        yield from self.entries_of((x.width,))

    def entries_of(self, shape: tuple[int, ...]) -> Iterator[Entry]:
        """Yield weight and bias of a norm inside another operation."""
        yield f"{self.name}.weight", FLOAT, shape
        yield f"{self.name}.bias", FLOAT, shape


@dataclasses.dataclass(frozen=True)
class Embed(Operation):
    """Patches of the image through a linear layer; rows and columns that fill no patch are not looked at."""

    op: ClassVar[str] = "embed"
    takes: ClassVar[tuple[str, ...]] = ("image",)
    patch: tuple[int, int] = field(pair_of(read_size))
    layer: Layer = field(record_of(Layer))

    def after(self, x: Stream, place: str) -> Stream:
        """Return one token per patch."""
        (height, width), (patch_height, patch_width) = x.grid, self.patch
        rows, columns = height // patch_height, width // patch_width
        need(rows * columns > 0, f"{place}.patch", f"an image of {height} x {width} holds no patch of {self.patch}")
        need(rows * columns <= MAX_SIZE, f"{place}.patch", f"it makes {rows * columns} tokens, the limit is {MAX_SIZE}")
        self.layer.check(f"{place}.layer", x.width * patch_height * patch_width)
        return Stream("tokens", rows * columns, self.layer.outputs, (rows, columns))

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield those of its layer."""
        yield from self.layer.entries()

    def layers(self) -> Iterator[Layer]:
        """Yield its layer."""
        yield self.layer

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield its layer's, once per patch."""
        yield self.layer.product((x.grid[0] // self.patch[0]) * (x.grid[1] // self.patch[1]))


@dataclasses.dataclass(frozen=True)
class Tokens(Operation):
    """The position embedding is added to the patches, and prefix tokens (class, registers) are put before them.

    The prefix tokens' own position embedding is already added to them in the file.
    """

    op: ClassVar[str] = "tokens"
    prefix: int = field(read_count, default=0)
    position: bool = field(read_flag, default=False)

    def after(self, x: Stream, place: str) -> Stream:
        """Return ``x`` with its prefix."""
        need(x.prefix == 0 and x.grid != (0, 0), place, "it must come before any other prefix tokens")
        need(x.tokens + self.prefix <= MAX_SIZE, f"{place}.prefix", f"more than {MAX_SIZE} tokens")
        return x._replace(tokens=x.tokens + self.prefix, prefix=self.prefix)

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield the prefix tokens and the position embedding."""
        if self.prefix:
            yield "prefix_tokens", FLOAT, (self.prefix, x.width)
        if self.position:
            yield "position_embedding", FLOAT, (x.tokens, x.width)


@dataclasses.dataclass(frozen=True)
class Merge(Operation):
    """Swin's patch merging: 2 x 2 neighbours side by side, (0, 0), (1, 0), (0, 1), (1, 1), then norm and layer."""

    op: ClassVar[str] = "merge"
    layer: Layer = field(record_of(Layer))
    norm: Norm | None = field(record_of(Norm), default=None)

    def after(self, x: Stream, place: str) -> Stream:
        """Return a grid of half the height and width."""
        rows, columns = x.grid
        fits = x.prefix == 0 and rows > 0 and rows % 2 == 0 and columns % 2 == 0
        need(fits, place, f"a grid of {rows} x {columns} patches with {x.prefix} prefix tokens cannot be merged")
        self.layer.check(f"{place}.layer", 4 * x.width)
        return Stream("tokens", x.tokens // 4, self.layer.outputs, (rows // 2, columns // 2))

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield those of its norm and its layer."""
        if self.norm is not None:
            yield from self.norm.entries_of((4 * x.width,))
        yield from self.layer.entries()

    def layers(self) -> Iterator[Layer]:
        """Yield its layer."""
        yield self.layer

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield its layer's, once per four patches."""
        yield self.layer.product(x.tokens // 4)


@dataclasses.dataclass(frozen=True)
class Pool(Operation):
    """Tokens become vectors: the first ones, the average, the maximum, or half the sum of both (``avgmax``)."""

    op: ClassVar[str] = "pool"
    kind: str = field(one_of(("token", "avg", "max", "avgmax")))
    tokens: int = field(read_size, default=1)
    """Of kind ``token``: how many, each a vector of its own."""
    skip: int = field(read_count, default=0)
    """Tokens at the start that average and maximum leave out."""

    def after(self, x: Stream, place: str) -> Stream:
        """Return vectors."""
        if self.kind == "token":
            need(self.skip == 0, f"{place}.skip", "a token's pooling skips none")
            need(self.tokens <= x.tokens, f"{place}.tokens", f"there are {x.tokens} tokens")
        else:
            need(self.tokens == 1, f"{place}.tokens", "only kind 'token' gives several")
            need(self.skip < x.tokens, f"{place}.skip", f"there are {x.tokens} tokens")
        return Stream("vectors", self.tokens, x.width)


@dataclasses.dataclass(frozen=True)
class Classify(Operation):
    """One classifier per vector; the logits are their mean."""

    op: ClassVar[str] = "classify"
    takes: ClassVar[tuple[str, ...]] = ("vectors",)
    heads: tuple[Layer, ...] = field(list_of(record_of(Layer)))

    def after(self, x: Stream, place: str) -> Stream:
        """Return the logits."""
        need(len(self.heads) == x.tokens, f"{place}.heads", f"{len(self.heads)} classifiers for {x.tokens} vectors")
        for index, layer in enumerate(self.heads):
            layer.check(f"{place}.heads[{index}]", x.width, self.heads[0].outputs)
        return Stream("logits", 1, self.heads[0].outputs)

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield those of its layers."""
        for layer in self.heads:
            yield from layer.entries()

    def layers(self) -> Iterator[Layer]:
        """Yield its layers."""
        yield from self.heads

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield each layer's, once."""
        for layer in self.heads:
            yield layer.product(1)


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)
