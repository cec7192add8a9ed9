"""Attention and MLP, the branches beside the residual stream, and the pooling by attention. No PyTorch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from qvit.config import Bits
from qvit.errors import PackedFileError
from qvit.format.fields import (
    MAX_SIZE,
    field,
    list_of,
    need,
    one_of,
    pair_of,
    read_bits,
    read_count,
    read_factor,
    read_flag,
    read_record,
    read_size,
    read_text,
    record_of,
    unknown,
)
from qvit.format.ops import ACTIVATIONS, FLOAT, OPERANDS, Entry, Layer, Norm, Operation, Product, Stream


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Tables of a rotation of queries and keys, ``NAME.cos`` and ``NAME.sin``: ``(heads, patches, head_dim / 2)``.

    Several attentions may share them. The channels that are rotated together are neighbours (``pairs``) or half a head
    apart (``halves``): ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``. Prefix tokens are not rotated.
    """

    name: str = field(read_text)
    layout: str = field(one_of(("pairs", "halves")))
    heads: int = field(read_size, default=1)
    """1, or a table per head."""


@dataclasses.dataclass(frozen=True)
class Attention(Operation):
    """Multi-head self-attention on codes, over all tokens or inside windows (docs/method.md, section 4).

    Queries and keys go through their norms, the rotation and the rectifier, in this order, before they are quantized.
    The logits are ``scale * q k^T``, plus the relative position bias, minus 100 between parts of a shifted window that
    are no neighbours in the image, as timm has it.
    """

    op: ClassVar[str] = "attention"
    name: str = field(read_text)
    heads: int = field(read_size)
    head_dim: int = field(read_size)
    qkv: Layer = field(record_of(Layer))
    query: int = field(read_bits)
    key: int = field(read_bits)
    value: int = field(read_bits)
    map: int = field(read_bits)
    proj: Layer = field(record_of(Layer))
    norm: Norm | None = field(record_of(Norm), default=None)
    scale: float | None = field(read_factor, default=None)
    """Of the logits; without it there is one per head, ``NAME.logit_scale``."""
    query_norm: Norm | None = field(record_of(Norm), default=None)
    key_norm: Norm | None = field(record_of(Norm), default=None)
    rotary: Rotary | None = field(record_of(Rotary), default=None)
    rectifier: str | None = field(one_of(("token", "affine")), default=None)
    window: tuple[int, int] | None = field(pair_of(read_size), default=None)
    shift: tuple[int, int] = field(pair_of(read_count), default=(0, 0))
    bias: str | None = field(one_of(("relative_position",)), default=None)
    inner_norm: Norm | None = field(record_of(Norm), default=None)
    """Before the projection."""

    @property
    def width(self) -> int:
        """Channels of all heads together."""
        return self.heads * self.head_dim

    def group(self, x: Stream) -> int:
        """Return how many tokens attend to one another."""
        return x.tokens if self.window is None else self.window[0] * self.window[1]

    def bias_rows(self, x: Stream) -> int:
        """Return the rows of the relative position bias table: offsets in the window, and three for prefix tokens."""
        height, width = self.window or x.grid
        return (2 * height - 1) * (2 * width - 1) + (3 if x.prefix else 0)

    def after(self, x: Stream, place: str) -> Stream:
        """Return ``x``: its shape stays."""
        need(self.width <= MAX_SIZE, f"{place}.heads", f"{self.width} channels, the limit is {MAX_SIZE}")
        self.qkv.check(f"{place}.qkv", x.width, 3 * self.width)
        self.proj.check(f"{place}.proj", self.width, x.width)
        if self.window is not None:
            self._check_window(x, place, self.window)
        else:
            need(self.shift == (0, 0), f"{place}.shift", "without a window there is nothing to shift")
        if self.bias is not None or self.rotary is not None:
            need(x.grid != (0, 0), place, "there is no grid of patches for its positions")
        if self.rotary is not None:
            need(self.head_dim % 2 == 0, f"{place}.head_dim", "an odd number of channels cannot be rotated")
            need(self.window is None, f"{place}.rotary", "inside windows there is no rotation")
            need(self.rotary.heads in (1, self.heads), f"{place}.rotary.heads", f"it must be 1 or {self.heads}")
        return x

    def _check_window(self, x: Stream, place: str, window: tuple[int, int]) -> None:
        need(x.prefix == 0 and x.grid != (0, 0), f"{place}.window", "windows need patches, and no prefix tokens")
        for side, length, shift in zip(x.grid, window, self.shift, strict=True):
            need(side % length == 0, f"{place}.window", f"{window} does not divide the grid of {x.grid} patches")
            need(shift < length, f"{place}.shift", f"{self.shift} goes beyond the window of {window}")

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield norm, layers, norms and rectifiers per head, scales per head, and what belongs to positions."""
        per_channel, per_head = (self.heads, self.head_dim), (self.heads,)
        if self.norm is not None:
            yield from self.norm.entries_of((x.width,))
        yield from self.qkv.entries()
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                yield from norm.entries_of(per_channel)
        if self.rotary is not None:
            table = self.rotary.heads, x.tokens - x.prefix, self.head_dim // 2
            yield f"{self.rotary.name}.cos", FLOAT, table
            yield f"{self.rotary.name}.sin", FLOAT, table
        if self.rectifier is not None:
            parts = {"token": ("gamma", "beta"), "affine": ("factor", "shift")}[self.rectifier]
            for operand in ("query", "key"):
                for part in parts:
                    yield f"{self.name}.{operand}_rectifier.{part}", FLOAT, per_channel
        for operand in OPERANDS:
            yield f"{self.name}.{operand}.scale", FLOAT, per_head
            if operand != "map":
                yield f"{self.name}.{operand}.offset", FLOAT, per_head
        if self.scale is None:
            yield f"{self.name}.logit_scale", FLOAT, per_head
        if self.bias is not None:
            yield f"{self.name}.relative_position_bias", FLOAT, (self.bias_rows(x), self.heads)
        if self.inner_norm is not None:
            yield from self.inner_norm.entries_of((self.width,))
        yield from self.proj.entries()

    def layers(self) -> Iterator[Layer]:
        """Yield qkv and proj."""
        yield from (self.qkv, self.proj)

    def operands(self) -> Iterator[tuple[str, int]]:
        """Yield queries, keys, values and the attention map."""
        for operand in OPERANDS:
            yield f"{self.name}.{operand}", getattr(self, operand)

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield those of the layers and of both attention products."""
        count = x.tokens * self.group(x) * self.width
        yield self.qkv.product(x.tokens)
        yield Product(f"{self.name}.query", Bits(self.key, self.query), count)
        yield Product(f"{self.name}.map", Bits(self.value, self.map), count)
        yield self.proj.product(x.tokens)


@dataclasses.dataclass(frozen=True)
class Mlp(Operation):
    """``fc2(act(fc1(x)))``, or with a gate: ``fc2(act(gate) * value)``.

    ``plain`` has no gate, ``glu`` takes it from the first half of fc1's outputs, ``glu_gate_last`` from the second, and
    ``swiglu`` from a layer of its own, ``gate``.
    """

    op: ClassVar[str] = "mlp"
    name: str = field(read_text)
    kind: str = field(one_of(("plain", "glu", "glu_gate_last", "swiglu")))
    activation: str = field(one_of(ACTIVATIONS))
    fc1: Layer = field(record_of(Layer))
    fc2: Layer = field(record_of(Layer))
    gate: Layer | None = field(record_of(Layer), default=None)
    norm: Norm | None = field(record_of(Norm), default=None)
    inner_norm: Norm | None = field(record_of(Norm), default=None)
    """Before fc2."""

    @property
    def hidden(self) -> int:
        """Width that enters fc2."""
        return self.fc2.inputs

    def after(self, x: Stream, place: str) -> Stream:
        """Return ``x``: its shape stays."""
        halves = 2 if self.kind in ("glu", "glu_gate_last") else 1
        need(halves * self.hidden <= MAX_SIZE, f"{place}.fc2.inputs", f"fc1 would have more than {MAX_SIZE} outputs")
        self.fc1.check(f"{place}.fc1", x.width, halves * self.hidden)
        need(
            (self.gate is not None) == (self.kind == "swiglu"), f"{place}.gate", "kind 'swiglu', and no other, has one"
        )
        if self.gate is not None:
            self.gate.check(f"{place}.gate", x.width, self.hidden)
        self.fc2.check(f"{place}.fc2", self.hidden, x.width)
        return x

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield norms and layers."""
        if self.norm is not None:
            yield from self.norm.entries_of((x.width,))
        for layer in self.layers():
            yield from layer.entries()
        if self.inner_norm is not None:
            yield from self.inner_norm.entries_of((self.hidden,))

    def layers(self) -> Iterator[Layer]:
        """Yield the gate, fc1 and fc2."""
        if self.gate is not None:
            yield self.gate
        yield from (self.fc1, self.fc2)


BRANCHES: dict[str, type[Attention | Mlp]] = {kind.op: kind for kind in (Attention, Mlp)}


def _read_branch(place: str, data: Any) -> Attention | Mlp:
    need(isinstance(data, dict) and isinstance(data.get("op"), str), place, "it must be an object with an op")
    kind = BRANCHES.get(data["op"])
    if kind is None:
        raise PackedFileError(f"{place}: {unknown(BRANCHES, data['op'])}.")
    return read_record(kind, place, {name: value for name, value in data.items() if name != "op"})


@dataclasses.dataclass(frozen=True)
class Residual(Operation):
    """``x`` plus the sum of its branches, all of which start from ``x``.

    A branch's norm comes before it, or, where ``post`` is set, after it.
    """

    op: ClassVar[str] = "residual"
    branches: tuple[Attention | Mlp, ...] = field(list_of(_read_branch))
    post: bool = field(read_flag, default=False)

    def after(self, x: Stream, place: str) -> Stream:
        """Return ``x``: its shape stays."""
        for index, branch in enumerate(self.branches):
            branch.after(x, f"{place}.branches[{index}]")
        windows = {(branch.window, branch.shift) for branch in self.branches if isinstance(branch, Attention)}
        need(len(windows) <= 1, f"{place}.branches", "attentions side by side must have the same windows")
        return x

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield those of its branches."""
        for branch in self.branches:
            yield from branch.entries(x)

    def layers(self) -> Iterator[Layer]:
        """Yield those of its branches."""
        for branch in self.branches:
            yield from branch.layers()

    def operands(self) -> Iterator[tuple[str, int]]:
        """Yield those of its branches."""
        for branch in self.branches:
            yield from branch.operands()

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield those of its branches."""
        for branch in self.branches:
            yield from branch.products(x)


@dataclasses.dataclass(frozen=True)
class AttentionPool(Operation):
    """One learned query per head attends to all tokens; its output is the only token from then on.

    The query is a constant, ``NAME.latent (heads, head_dim)``, which is quantized as it stands; of ``kv`` the first
    half gives the keys.
    """

    op: ClassVar[str] = "attention_pool"
    name: str = field(read_text)
    heads: int = field(read_size)
    head_dim: int = field(read_size)
    scale: float = field(read_factor)
    kv: Layer = field(record_of(Layer))
    query: int = field(read_bits)
    key: int = field(read_bits)
    value: int = field(read_bits)
    map: int = field(read_bits)
    proj: Layer = field(record_of(Layer))
    key_norm: Norm | None = field(record_of(Norm), default=None)

    @property
    def width(self) -> int:
        """Channels of all heads together."""
        return self.heads * self.head_dim

    def after(self, x: Stream, place: str) -> Stream:
        """Return one token."""
        need(2 * self.width <= MAX_SIZE, f"{place}.heads", f"kv would have more than {MAX_SIZE} outputs")
        self.kv.check(f"{place}.kv", x.width, 2 * self.width)
        self.proj.check(f"{place}.proj", self.width)
        return Stream("tokens", 1, self.proj.outputs)

    def entries(self, x: Stream) -> Iterator[Entry]:
        """Yield the latent query, layers and scales per head."""
        yield f"{self.name}.latent", FLOAT, (self.heads, self.head_dim)
        yield from self.kv.entries()
        if self.key_norm is not None:
            yield from self.key_norm.entries_of((self.heads, self.head_dim))
        for operand in OPERANDS:
            yield f"{self.name}.{operand}.scale", FLOAT, (self.heads,)
            if operand != "map":
                yield f"{self.name}.{operand}.offset", FLOAT, (self.heads,)
        yield from self.proj.entries()

    def layers(self) -> Iterator[Layer]:
        """Yield kv and proj."""
        yield from (self.kv, self.proj)

    def operands(self) -> Iterator[tuple[str, int]]:
        """Yield the query, keys, values and the attention map."""
        for operand in OPERANDS:
            yield f"{self.name}.{operand}", getattr(self, operand)

    def products(self, x: Stream) -> Iterator[Product]:
        """Yield those of the layers and of both attention products."""
        yield self.kv.product(x.tokens)
        yield Product(f"{self.name}.query", Bits(self.key, self.query), x.tokens * self.width)
        yield Product(f"{self.name}.map", Bits(self.value, self.map), x.tokens * self.width)
        yield self.proj.product(1)
