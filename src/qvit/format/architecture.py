"""What a packed model looks like inside: its sizes, its layers and the entries of its file. No PyTorch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qvit.config import MAX_BITS, MIN_BITS, Bits
from qvit.errors import PackedFileError

MAX_SIZE = 2**16
"""Largest number of any kind. As the length of a dot product of 8-bit codes it keeps the sum within int32:
2^16 * 255 * 128 < 2^31."""
MAX_PIXELS = 2**26
"""Largest number of values in one image, so that a header alone cannot ask for a huge one."""
OPERANDS = ("query", "key", "value", "attention")
"""The quantized operands of the two attention products; codes are signed, those of ``attention`` unsigned."""

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "position_embedding": ("all", "patches", "none"),
    "block": ("pre", "post", "parallel"),
    "rectify": (None, "head", "token"),
    "mlp": ("plain", "glu", "swiglu"),
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu"),
    "pool": ("token", "avg", "avgmax", "max"),
}

Entry = tuple[str, np.dtype, tuple[int, ...]]
_CODES, _FLOAT = np.dtype(np.uint8), np.dtype("<f4")


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension: ``layer`` (mean and variance) or ``rms`` (mean square)."""

    kind: str
    eps: float


class Linear(NamedTuple):
    """A linear layer on codes: its name and the sizes of its weight ``(outputs, inputs)``."""

    name: str
    outputs: int
    inputs: int


class Branch(NamedTuple):
    """One path beside the residual stream: timm's names of its norm and of its attention or MLP."""

    norm: str
    name: str
    is_attention: bool


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A vision transformer of timm's family, as plain data that is checked when it is made.

    Args:
        name: timm's name or class name, for people.
        image_size: pixels, (height, width).
        patch_size: pixels, (height, width); rows and columns that fill no patch are not looked at.
        channels: of the image.
        embed_dim: width C of the residual stream.
        num_heads: attention heads H.
        head_dim: channels D a head; H * D may differ from C.
        depth: blocks.
        class_token: whether there is one.
        distillation_token: whether there is one; its head is ``head_dist`` and the logits are the two heads' mean.
        register_tokens: their number.
        position_embedding: ``all`` tokens have one, only the ``patches``, or ``none``. The prefix tokens' own is
            already added to them in the file.
        norm: of the blocks.
        embed_norm: of the patch embedding (``patch_embed.norm``), before the position embedding.
        pre_norm: before the blocks (``norm_pre``).
        final_norm: after the blocks (``norm``).
        pool_norm: after pooling (``fc_norm``).
        qk_norm: of queries and keys, a head.
        attention_norm: before the attention's projection (``attn.norm``).
        mlp_norm: before the MLP's second layer (``mlp.norm``).
        block: ``pre`` (x + f(norm(x))), ``post`` (x + norm(f(x))), or ``parallel`` (x + the sum of f_j(norm_j(x))).
        parallel: branches of a ``parallel`` block, else 1.
        rectify: kind of the rectifier; ``head`` is folded into the layers before it, ``token`` has entries.
        mlp: ``plain``, ``glu`` (fc1 gives both halves) or ``swiglu`` (fc1_g is the gate, fc1_x the value).
        mlp_hidden: width that enters fc2.
        gate_last: of a ``glu``: whether the second half is the gate.
        activation: of the MLP.
        attention_scale: factor of the attention logits.
        pool: how tokens become one vector; ``avgmax`` is half the sum of average and maximum.
        pool_skip: tokens at the start that the average or maximum leaves out.
        class_count: logits.

    Raises:
        PackedFileError: naming the field that cannot be meant.
    """

    name: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    embed_dim: int
    num_heads: int
    head_dim: int
    depth: int
    class_token: bool
    distillation_token: bool
    register_tokens: int
    position_embedding: str
    norm: Norm
    embed_norm: Norm | None
    pre_norm: Norm | None
    final_norm: Norm | None
    pool_norm: Norm | None
    qk_norm: Norm | None
    attention_norm: Norm | None
    mlp_norm: Norm | None
    block: str
    parallel: int
    rectify: str | None
    mlp: str
    mlp_hidden: int
    gate_last: bool
    activation: str
    attention_scale: float
    pool: str
    pool_skip: int
    class_count: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field.name, str(field.type), getattr(self, field.name))
        rows, columns = self.grid
        _need(rows > 0 and columns > 0, "image_size", f"{self.image_size} holds no patch of {self.patch_size}")
        pixels = self.channels * self.image_size[0] * self.image_size[1]
        _need(pixels <= MAX_PIXELS, "image_size", f"an image of {pixels} values is beyond the limit of {MAX_PIXELS}")
        for what, value in (
            ("patch_size", self.patch_inputs),
            ("image_size", self.tokens),
            ("head_dim", self.attention_dim),
        ):
            _need(value <= MAX_SIZE, what, f"it makes a dot product of {value} codes, the limit is {MAX_SIZE}")
        _need(0 < self.attention_scale <= MAX_SIZE, "attention_scale", f"it must be positive and at most {MAX_SIZE}")
        _need(self.parallel == 1 or self.block == "parallel", "parallel", "only a parallel block has branches")
        _need(self.class_token or self.pool != "token", "pool", "'token' needs a class token")
        _need(
            not self.distillation_token or (self.class_token and self.pool == "token"),
            "distillation_token",
            "it needs a class token and pool 'token'",
        )
        allowed = (0,) if self.pool == "token" else (0, self.prefix_tokens)
        _need(self.pool_skip in allowed, "pool_skip", f"it must be one of {sorted(set(allowed))}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return self.class_token + self.distillation_token + self.register_tokens

    @property
    def tokens(self) -> int:
        """Tokens N of an image."""
        return self.prefix_tokens + self.patches

    @property
    def patch_inputs(self) -> int:
        """Values of one patch."""
        return self.channels * self.patch_size[0] * self.patch_size[1]

    @property
    def attention_dim(self) -> int:
        """Width of the attention, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def head_names(self) -> tuple[str, ...]:
        """The classifiers: one, or two with a distillation token."""
        return ("head", "head_dist") if self.distillation_token else ("head",)

    def stages(self, block: int) -> list[list[Branch]]:
        """Return the attention and the MLP stage of a block: branches whose results are added to the residual."""
        at = f"blocks.{block}"
        if self.block == "parallel":
            attentions = [f"{at}.attns.{j}" for j in range(self.parallel)]
            mlps = [f"{at}.ffns.{j}" for j in range(self.parallel)]
            return [
                [Branch(f"{name}.norm", f"{name}.attn", True) for name in attentions],
                [Branch(f"{name}.norm", f"{name}.mlp", False) for name in mlps],
            ]
        return [[Branch(f"{at}.norm1", f"{at}.attn", True)], [Branch(f"{at}.norm2", f"{at}.mlp", False)]]

    def branches(self) -> Iterator[Branch]:
        """Yield every attention and MLP in the order they run."""
        for block in range(self.depth):
            for stage in self.stages(block):
                yield from stage

    def linear_layers(self) -> Iterator[Linear]:
        """Yield every linear layer in the order they run, the patch embedding among them."""
        yield Linear("patch_embed.proj", self.embed_dim, self.patch_inputs)
        for branch in self.branches():
            yield from self.branch_layers(branch)
        for name in self.head_names:
            yield Linear(name, self.class_count, self.embed_dim)

    def branch_layers(self, branch: Branch) -> list[Linear]:
        """Return the linear layers of an attention or an MLP."""
        name, width, hidden = branch.name, self.embed_dim, self.mlp_hidden
        if branch.is_attention:
            return [
                Linear(f"{name}.qkv", 3 * self.attention_dim, width),
                Linear(f"{name}.proj", width, self.attention_dim),
            ]
        if self.mlp == "swiglu":
            first = [Linear(f"{name}.fc1_g", hidden, width), Linear(f"{name}.fc1_x", hidden, width)]
        else:
            first = [Linear(f"{name}.fc1", 2 * hidden if self.mlp == "glu" else hidden, width)]
        return [*first, Linear(f"{name}.fc2", width, hidden)]

    def bit_names(self) -> Iterator[str]:
        """Yield the names that have bits: every linear layer and the four operands of every attention."""
        yield "patch_embed.proj"
        for branch in self.branches():
            for layer in self.branch_layers(branch):
                yield layer.name
            if branch.is_attention:
                for operand in OPERANDS:
                    yield f"{branch.name}.{operand}"
        yield from self.head_names

    def entries(self, bits: Mapping[str, Bits]) -> Iterator[Entry]:
        """Yield name, dtype and shape of every tensor of the file, lazily: a false ``depth`` costs nothing.

        Args:
            bits: of every name in :meth:`bit_names`.
        """
        embed, branch_sizes = self.embed_dim, (self.num_heads, self.head_dim)
        yield from _linear_entries(Linear("patch_embed.proj", embed, self.patch_inputs), bits)
        yield from _norm_entries("patch_embed.norm", self.embed_norm, (embed,))
        if self.prefix_tokens:
            yield "prefix_tokens", _FLOAT, (self.prefix_tokens, embed)
        if self.position_embedding != "none":
            yield "position_embedding", _FLOAT, (self.patches, embed)
        yield from _norm_entries("norm_pre", self.pre_norm, (embed,))
        for branch in self.branches():
            name = branch.name
            yield from _norm_entries(branch.norm, self.norm, (embed,))
            for layer in self.branch_layers(branch):
                yield from _linear_entries(layer, bits)
            if not branch.is_attention:
                yield from _norm_entries(f"{name}.norm", self.mlp_norm, (self.mlp_hidden,))
                continue
            for norm in ("q_norm", "k_norm"):
                yield from _norm_entries(f"{name}.{norm}", self.qk_norm, branch_sizes)
            if self.rectify == "token":
                for rectifier in ("query_rectifier", "key_rectifier"):
                    yield f"{name}.{rectifier}.gamma", _FLOAT, branch_sizes
                    yield f"{name}.{rectifier}.beta", _FLOAT, branch_sizes
            for operand in OPERANDS:
                yield f"{name}.{operand}.scale", _FLOAT, (self.num_heads,)
                if operand != "attention":
                    yield f"{name}.{operand}.offset", _FLOAT, (self.num_heads,)
            yield from _norm_entries(f"{name}.norm", self.attention_norm, (self.attention_dim,))
        yield from _norm_entries("norm", self.final_norm, (embed,))
        yield from _norm_entries("fc_norm", self.pool_norm, (embed,))
        for name in self.head_names:
            yield from _linear_entries(Linear(name, self.class_count, embed), bits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the file's header; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Architecture:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PackedFileError: naming the field that is absent, unknown or cannot be meant.
        """
        values = dict(_fields_of(cls, "architecture", data))
        for name in ("image_size", "patch_size"):
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        for field in dataclasses.fields(cls):
            if str(field.type).startswith("Norm") and values[field.name] is not None:
                values[field.name] = Norm(**_fields_of(Norm, f"architecture.{field.name}", values[field.name]))
        return cls(**values)


def _linear_entries(layer: Linear, bits: Mapping[str, Bits]) -> Iterator[Entry]:
    name, outputs, inputs = layer
    yield f"{name}.codes", _CODES, (outputs, packed_bytes(inputs, bits[name].weight))
    yield f"{name}.scale", _FLOAT, (outputs,)
    yield f"{name}.bias", _FLOAT, (outputs,)
    yield f"{name}.input_scale", _FLOAT, (1,)
    yield f"{name}.input_offset", _FLOAT, (1,)


def _norm_entries(name: str, norm: Norm | None, shape: tuple[int, ...]) -> Iterator[Entry]:
    if norm is not None:
        yield f"{name}.weight", _FLOAT, shape
        yield f"{name}.bias", _FLOAT, shape


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def _fields_of(cls: Any, what: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise PackedFileError(f"{what} must be an object, not {shown(data)}.")
    names = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in data:
            raise PackedFileError(f"{what}.{name} is absent.")
    for name in data:
        if name not in names:
            raise PackedFileError(f"{what} has an unknown field {shown(name)}.")
    return data


def _check_field(name: str, kind: str, value: Any) -> None:
    if name in _CHOICES:
        allowed = _CHOICES[name]
        _need(value in allowed, name, f"it must be one of {list(allowed)}, not {shown(value)}")
    elif kind == "str":
        _need(isinstance(value, str), name, f"it must be text, not {shown(value)}")
    elif kind == "bool":
        _need(isinstance(value, bool), name, f"it must be true or false, not {shown(value)}")
    elif kind == "int":
        _check_size(name, value, 0 if name in ("register_tokens", "pool_skip") else 1)
    elif kind == "float":
        _need(is_number(value), name, f"it must be a finite number, not {shown(value)}")
    elif kind.startswith("tuple"):
        _need(isinstance(value, tuple) and len(value) == 2, name, f"it must be two numbers, not {shown(value)}")
        for side in value:
            _check_size(name, side, 1)
    elif value is not None or kind == "Norm":
        _need(isinstance(value, Norm), name, f"it must be a norm, not {shown(value)}")
        _need(value.kind in ("layer", "rms"), name, f"its kind must be layer or rms, not {shown(value.kind)}")
        _need(is_number(value.eps) and 0 < value.eps < 1, name, f"eps must be between 0 and 1, not {shown(value.eps)}")


def _check_size(name: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    reason = f"it must be a whole number from {least} to {MAX_SIZE}, not {shown(value)}"
    _need(whole and least <= value <= MAX_SIZE, name, reason)


def _need(condition: bool, field: str, reason: str) -> None:
    if not condition:
        raise PackedFileError(f"architecture.{field}: {reason}.")


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number of ordinary size, and no truth value."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MAX_PIXELS
    return isinstance(value, float) and math.isfinite(value)


def is_bits(value: Any) -> bool:
    """Return whether ``value`` is a number of bits that qvit works with."""
    return isinstance(value, int) and not isinstance(value, bool) and MIN_BITS <= value <= MAX_BITS


def shown(value: Any) -> str:
    """Return ``value`` for an error message, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print whole numbers of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."
