"""What a packed file means: every operation in plain NumPy. Arithmetic: :mod:`qvit.runtime.arithmetic`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qvit.errors import DataError
from qvit.format.branches import Attention, AttentionPool, Mlp, Residual
from qvit.format.ops import Classify, Embed, Layer, Merge, Norm, Pool, Stream, Tokens
from qvit.format.packed import PackedModel
from qvit.runtime.arithmetic import (
    activate,
    attention_logits,
    attention_output,
    linear_codes,
    normalize,
    quantize,
    rectify,
    relative_positions,
    rotate,
    signed_range,
    softmax,
    window_regions,
)

Array = np.ndarray
Watch = Callable[[str, Array], None]
"""Called with the name of a quantizer and its codes, an integer array of any shape."""
MASKED = np.float32(-100)
"""Added to the logits of tokens of a shifted window that are no neighbours, as in timm."""


class ReferenceEngine:
    """A packed model that runs in NumPy.

    Args:
        packed: what :func:`qvit.format.packed.read_packed` returned.
        watch: sees the codes of every quantizer, by the name that its bits have in the file.
    """

    def __init__(self, packed: PackedModel, watch: Watch | None = None) -> None:
        self.packed, self.program, self.tensors = packed, packed.program, packed.tensors
        self._watch = watch

    def __call__(self, images: Array) -> Array:
        """Return logits ``(B, classes)`` of preprocessed images ``(B, C, H, W)``, both float32.

        Of a feature extractor the pooled vectors, ``(B, width)``.

        Raises:
            DataError: for images of another shape, or with a NaN or an infinity.
        """
        expected = self.program.input
        if images.ndim != 4 or images.shape[1:] != expected:
            raise DataError(
                f"{self.program.name} takes images of shape (B, {', '.join(map(str, expected))}), not {images.shape}."
            )
        if not np.isfinite(images).all():
            raise DataError("The images hold a NaN or an infinity.")
        values = images.astype(np.float32)
        for operation, x in self.program.walk():
            values = RUN[type(operation)](self, operation, x, values)
        return values.reshape(len(images), self.program.output)

    def layer(self, layer: Layer, x: Array) -> Array:
        """Return a linear layer's outputs for ``x (..., inputs)``, which becomes codes first."""
        parts = self.packed.layer(layer)
        codes = quantize(x, parts.input_scale, parts.input_offset, *signed_range(layer.bits.activation))
        self.see(layer.name, codes)
        return linear_codes(codes, parts)

    def operand(self, name: str, bits: int, x: Array) -> tuple[Array, Array, Array]:
        """Return codes, scales and offsets of one operand ``(B, H, N, D)`` of the attention products."""
        scale, offset = self.tensors[f"{name}.scale"], self.tensors[f"{name}.offset"]
        codes = quantize(x, scale[:, None, None], offset[:, None, None], *signed_range(bits))
        self.see(name, codes)
        return codes, scale, offset

    def norm(self, norm: Norm | None, x: Array) -> Array:
        """Return ``x (..., width)`` normalised."""
        if norm is None:
            return x
        return normalize(x, norm, self.tensors[f"{norm.name}.weight"], self.tensors[f"{norm.name}.bias"])

    def head_norm(self, norm: Norm | None, x: Array) -> Array:
        """Return ``x (B, H, N, D)`` normalised, each head with weights of its own."""
        if norm is None:
            return x
        weight, bias = self.tensors[f"{norm.name}.weight"], self.tensors[f"{norm.name}.bias"]
        return normalize(x, norm, weight[:, None], bias[:, None])

    def products(self, op: Attention | AttentionPool, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        """Return what attention gives for q, k and v ``(B, H, N, D)``, each of which becomes codes first.

        ``bias`` is added to the scaled logits ``(B, H, N, N)``.
        """
        q_codes, a_q, z_q = self.operand(f"{op.name}.query", op.query, q)
        k_codes, a_k, z_k = self.operand(f"{op.name}.key", op.key, k)
        v_codes, a_v, z_v = self.operand(f"{op.name}.value", op.value, v)
        scale = self.tensors[f"{op.name}.logit_scale"][:, None, None] if op.scale is None else op.scale
        logits = attention_logits(q_codes, k_codes, a_q, z_q, a_k, z_k) * scale
        a_p = self.tensors[f"{op.name}.map.scale"]
        attention = softmax(logits if bias is None else logits + bias)
        p_codes = quantize(attention, a_p[:, None, None], np.float32(0), 0, 2**op.map - 1)
        self.see(f"{op.name}.map", p_codes)
        return attention_output(p_codes, v_codes, a_p, a_v, z_v)

    def see(self, name: str, codes: Array) -> None:
        """Show the codes of a quantizer to who watches."""
        if self._watch is not None:
            self._watch(name, codes)


def _embed(engine: ReferenceEngine, op: Embed, x: Stream, images: Array) -> Array:
    height, width = op.patch
    rows, columns = x.grid[0] // height, x.grid[1] // width
    cut = images[:, :, : rows * height, : columns * width]
    patches = cut.reshape(len(cut), x.width, rows, height, columns, width).transpose(0, 2, 4, 1, 3, 5)
    return engine.layer(op.layer, patches.reshape(len(cut), rows * columns, op.layer.inputs))


def _tokens(engine: ReferenceEngine, op: Tokens, x: Stream, values: Array) -> Array:
    if op.position:
        values = values + engine.tensors["position_embedding"]
    if op.prefix:
        prefix = np.broadcast_to(engine.tensors["prefix_tokens"], (len(values), op.prefix, x.width))
        values = np.concatenate([prefix, values], axis=1)
    return values


def _norm(engine: ReferenceEngine, op: Norm, x: Stream, values: Array) -> Array:
    return engine.norm(op, values)


def _residual(engine: ReferenceEngine, op: Residual, x: Stream, values: Array) -> Array:
    total: Any = 0
    for branch in op.branches:
        run = RUN[type(branch)]
        if op.post:
            total = total + engine.norm(branch.norm, run(engine, branch, x, values))
        else:
            total = total + run(engine, branch, x, engine.norm(branch.norm, values))
    result: Array = values + total
    return result


def _attention(engine: ReferenceEngine, op: Attention, x: Stream, values: Array) -> Array:
    B = len(values)
    windows = None if op.window is None else Windows(x.grid, op.window, op.shift)
    if windows is not None:
        values = windows.split(values)
    group = values.shape[1]
    qkv = engine.layer(op.qkv, values).reshape(len(values), group, 3, op.heads, op.head_dim)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    q, k = engine.head_norm(op.query_norm, q), engine.head_norm(op.key_norm, k)
    if op.rotary is not None:
        cos, sin = (engine.tensors[f"{op.rotary.name}.{part}"] for part in ("cos", "sin"))
        for operand in (q, k):
            operand[:, :, x.prefix :] = rotate(operand[:, :, x.prefix :], cos, sin, op.rotary.layout)
    q, k = (_rectified(engine, op, name, operand) for name, operand in (("query", q), ("key", k)))
    out = engine.products(op, q, k, v, _bias(engine, op, x, windows, B))
    out = out.transpose(0, 2, 1, 3).reshape(len(values), group, op.width)
    out = engine.layer(op.proj, engine.norm(op.inner_norm, out))
    return out if windows is None else windows.join(out)


def _rectified(engine: ReferenceEngine, op: Attention, operand: str, x: Array) -> Array:
    name = f"{op.name}.{operand}_rectifier"
    if op.rectifier == "token":
        return rectify(x, engine.tensors[f"{name}.gamma"], engine.tensors[f"{name}.beta"])
    if op.rectifier == "affine":
        factor, shift = engine.tensors[f"{name}.factor"], engine.tensors[f"{name}.shift"]
        return (x * factor[:, None] + shift[:, None]).astype(np.float32)
    return x


def _bias(engine: ReferenceEngine, op: Attention, x: Stream, windows: Windows | None, images: int) -> Array | None:
    """Return what is added to the logits, broadcast against ``(B, H, N, N)``; windows stand side by side in B."""
    bias = None
    if op.bias is not None:
        table = engine.tensors[f"{op.name}.relative_position_bias"]
        bias = table[bias_rows(op, x)].transpose(2, 0, 1)[None]
    if windows is not None and any(op.shift):
        apart = np.tile(windows.apart(), (images, 1, 1))[:, None]
        masked = np.where(apart, MASKED, np.float32(0))
        bias = masked if bias is None else bias + masked
    return bias


def bias_rows(op: Attention, x: Stream) -> Array:
    """Return the row of an attention's relative position bias table for each query and key, ``(N, N)``."""
    rows = relative_positions(op.window or x.grid, prefix=x.prefix > 0)
    # Several prefix tokens share the rows of the first.
    index = np.maximum(np.arange(op.group(x)) - max(x.prefix - 1, 0), 0)
    return np.asarray(rows[np.ix_(index, index)])


class Windows:
    """Tokens of a grid gathered window by window after a cyclic shift, and put back."""

    def __init__(self, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
        self.grid, self.window, self.shift = grid, window, shift
        place = np.arange(grid[0] * grid[1]).reshape(grid)
        self.order = self._gathered(np.roll(place, (-shift[0], -shift[1]), (0, 1)))
        """Token of each place, ``(windows, tokens of a window)``."""

    def _gathered(self, values: Array) -> Array:
        (rows, columns), (height, width) = self.grid, self.window
        parts = values.reshape(rows // height, height, columns // width, width).transpose(0, 2, 1, 3)
        return parts.reshape(-1, height * width)

    def split(self, values: Array) -> Array:
        """Return ``(B, N, C)`` as ``(B * windows, tokens of a window, C)``."""
        return values[:, self.order].reshape(-1, self.order.shape[1], values.shape[-1])

    def join(self, values: Array) -> Array:
        """Undo :meth:`split`."""
        whole = values.reshape(-1, self.order.size, values.shape[-1])
        out = np.empty_like(whole)
        out[:, self.order.reshape(-1)] = whole
        return out

    def apart(self) -> Array:
        """Return which tokens of each window are no neighbours in the image, ``(windows, n, n)``."""
        regions = self.regions()
        return np.asarray(regions[:, :, None] != regions[:, None, :])

    def regions(self) -> Array:
        """Return the region of each token of each window, ``(windows, n)``; see :func:`window_regions`."""
        return self._gathered(window_regions(self.grid, self.window, self.shift))


def _mlp(engine: ReferenceEngine, op: Mlp, x: Stream, values: Array) -> Array:
    if op.gate is not None:
        gate = activate(engine.layer(op.gate, values), op.activation)
        hidden = gate * engine.layer(op.fc1, values)
    elif op.kind == "plain":
        hidden = activate(engine.layer(op.fc1, values), op.activation)
    else:
        first, second = np.split(engine.layer(op.fc1, values), 2, axis=-1)
        gate, value = (second, first) if op.kind == "glu_gate_last" else (first, second)
        hidden = activate(gate, op.activation) * value
    return engine.layer(op.fc2, engine.norm(op.inner_norm, hidden))


def _merge(engine: ReferenceEngine, op: Merge, x: Stream, values: Array) -> Array:
    (rows, columns), B = x.grid, len(values)
    parts = values.reshape(B, rows // 2, 2, columns // 2, 2, x.width).transpose(0, 1, 3, 4, 2, 5)
    return engine.layer(op.layer, engine.norm(op.norm, parts.reshape(B, x.tokens // 4, 4 * x.width)))


def _pool(engine: ReferenceEngine, op: Pool, x: Stream, values: Array) -> Array:
    if op.kind == "token":
        return values[:, : op.tokens]
    values = values[:, op.skip :]
    average = values.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    largest = values.max(axis=1, keepdims=True)
    return {"avg": average, "max": largest, "avgmax": 0.5 * (average + largest)}[op.kind]


def _attention_pool(engine: ReferenceEngine, op: AttentionPool, x: Stream, values: Array) -> Array:
    B, N, _ = values.shape
    k, v = engine.layer(op.kv, values).reshape(B, N, 2, op.heads, op.head_dim).transpose(2, 0, 3, 1, 4)
    q = np.broadcast_to(engine.tensors[f"{op.name}.latent"][None, :, None], (B, op.heads, 1, op.head_dim))
    out = engine.products(op, q, engine.head_norm(op.key_norm, k), v, None)
    return engine.layer(op.proj, out.transpose(0, 2, 1, 3).reshape(B, 1, op.width))


def _classify(engine: ReferenceEngine, op: Classify, x: Stream, values: Array) -> Array:
    logits = [engine.layer(layer, values[:, index]) for index, layer in enumerate(op.heads)]
    total: Array = sum(logits) / len(logits)  # type: ignore[assignment]
    return total.astype(np.float32)


Step = Callable[[ReferenceEngine, Any, Stream, Array], Array]
RUN: dict[type, Step] = {
    Embed: _embed,
    Tokens: _tokens,
    Norm: _norm,
    Residual: _residual,
    Attention: _attention,
    Mlp: _mlp,
    Merge: _merge,
    Pool: _pool,
    AttentionPool: _attention_pool,
    Classify: _classify,
}
"""What runs an operation: called with the engine, the operation, what flows in, and its values ``(B, ...)``."""
