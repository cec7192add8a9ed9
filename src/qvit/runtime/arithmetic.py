"""The arithmetic of a packed file in plain NumPy, every product of codes in int64 (docs/method.md, sections 1 and 2).

Written to be read and to be compared against, not to be fast: the kernels are tested bit for bit against its integer
products, and the training wing's affine algebra against its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qvit.format.ops import Norm
from qvit.format.packed import PackedLayer

Array = np.ndarray


def quantize(x: Array, scale: Array | np.float32, offset: Array | np.float32, low: int, high: int) -> Array:
    """Return the codes ``round(clip((x - offset) / scale, low, high))`` in int64, rounded half to even.

    The arithmetic before the rounding is float32, as in the training wing: a code is decided there.
    """
    x = x.astype(np.float32)
    return np.rint(np.clip((x - offset) / scale, low, high)).astype(np.int64)


def signed_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest signed code of ``bits`` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def integer_matmul(a: Array, b: Array) -> Array:
    """Return ``a b^T`` of codes ``(..., M, K)`` and ``(..., N, K)``: ``(..., M, N)``, exact in int64."""
    return np.asarray(a.astype(np.int64) @ b.astype(np.int64).swapaxes(-1, -2))


def linear_codes(codes: Array, layer: PackedLayer) -> Array:
    """Return ``x_hat w_hat^T + bias`` for input codes ``(..., K)``: ``(..., outputs)``, float32.

    With ``x_hat = a Q + z`` and ``w_hat = s W``: ``a s (Q W^T) + z s rowsum(W) + bias``.
    """
    weight = layer.codes.astype(np.int64)
    input_scale, input_offset = float(layer.input_scale), float(layer.input_offset)
    scale, bias = layer.scale.astype(np.float64), layer.bias.astype(np.float64)
    product = integer_matmul(codes, weight)
    return (input_scale * scale * product + input_offset * scale * weight.sum(axis=1) + bias).astype(np.float32)


def attention_logits(q: Array, k: Array, a_q: Array, z_q: Array, a_k: Array, z_k: Array) -> Array:
    """Return ``q_hat k_hat^T`` for codes ``(B, H, N, D)``: ``(B, H, N, N)``, float64.

    The offsets contribute one rank-1 term each and a constant. Scales and offsets are ``(H,)``.
    """
    a_q, z_q, a_k, z_k = (v.astype(np.float64)[:, None, None] for v in (a_q, z_q, a_k, z_k))
    q_sums, k_sums = q.sum(axis=-1)[..., :, None], k.sum(axis=-1)[..., None, :]
    return a_q * a_k * integer_matmul(q, k) + a_q * z_k * q_sums + a_k * z_q * k_sums + q.shape[-1] * z_q * z_k


def attention_output(p: Array, v: Array, a_p: Array, a_v: Array, z_v: Array) -> Array:
    """Return ``p_hat v_hat`` for codes of the attention map ``(B, H, N, N)`` and values ``(B, H, N, D)``, float32."""
    a_p, a_v, z_v = (x.astype(np.float64)[:, None, None] for x in (a_p, a_v, z_v))
    product = integer_matmul(p, v.swapaxes(-1, -2))
    return (a_p * a_v * product + a_p * z_v * p.sum(axis=-1, keepdims=True)).astype(np.float32)


def softmax(x: Array) -> Array:
    """Return the softmax over the last dimension, float32."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def normalize(x: Array, norm: Norm, weight: Array, bias: Array) -> Array:
    """Return LayerNorm or RMSNorm over the last dimension, float32; ``weight`` and ``bias`` broadcast against x."""
    wide = x.astype(np.float64)
    if norm.kind == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    mean_square = np.square(wide).mean(axis=-1, keepdims=True)
    return (wide / np.sqrt(mean_square + norm.eps) * weight + bias).astype(np.float32)


def rectify(x: Array, gamma: Array, beta: Array) -> Array:
    """Return the token rectifier of ``x (B, H, N, D)``, float32: ``(x - mu + beta) / (gamma sqrt(var + 1e-6))``."""
    wide = x.astype(np.float64)
    mean, variance = wide.mean(axis=-1, keepdims=True), wide.var(axis=-1, keepdims=True)
    return ((wide - mean + beta[:, None]) / (gamma[:, None] * np.sqrt(variance + 1e-6))).astype(np.float32)


def _erf(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.reshape(-1)), np.float64, x.size).reshape(x.shape)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
}


def activate(x: Array, kind: str) -> Array:
    """Return the activation function called ``kind``, one of :data:`qvit.format.ops.ACTIVATIONS`, float32."""
    return ACTIVATIONS[kind](x.astype(np.float64)).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array, layout: str) -> Array:
    """Return ``x (B, H, N, D)``, float32, its channels rotated two by two by ``cos`` and ``sin (1 or H, N, D / 2)``.

    ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``; the two are neighbours (``pairs``) or half a head apart
    (``halves``).
    """
    half = x.shape[-1] // 2
    first, second = (x[..., :half], x[..., half:]) if layout == "halves" else (x[..., 0::2], x[..., 1::2])
    first, second = first.astype(np.float64), second.astype(np.float64)
    out = np.empty(x.shape, np.float32)
    low, high = (out[..., :half], out[..., half:]) if layout == "halves" else (out[..., 0::2], out[..., 1::2])
    low[:], high[:] = first * cos - second * sin, second * cos + first * sin
    return out


def relative_positions(window: tuple[int, int], prefix: bool) -> Array:
    """Return which row of a relative position bias table belongs to query i and key j, ``(N, N)``.

    Rows are the offsets of the query's place from the key's, row by row; with a ``prefix`` token the last three are
    from it to any token, from any patch to it, and from it to itself.
    """
    height, width = window
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1).reshape(-1, 2)
    offset = place[:, None] - place[None, :] + (height - 1, width - 1)
    rows: Array = offset[..., 0] * (2 * width - 1) + offset[..., 1]
    if not prefix:
        return rows
    count = (2 * height - 1) * (2 * width - 1)
    whole = np.empty((len(rows) + 1, len(rows) + 1), rows.dtype)
    whole[1:, 1:], whole[0], whole[1:, 0], whole[0, 0] = rows, count, count + 1, count + 2
    return whole


def window_regions(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Array:
    """Return the region of each patch ``(rows, columns)`` after a cyclic shift: neighbours in the image share it.

    Tokens of one window whose regions differ do not look at one another (timm adds -100 to their logits).
    """
    regions = np.zeros(grid, np.int64)
    for axis, (side, length, distance) in enumerate(zip(grid, window, shift, strict=True)):
        place = np.arange(side)
        part = np.where(place < side - length, 0, np.where(place < side - distance, 1, 2)) if distance else 0 * place
        regions = regions * 3 + (part[:, None] if axis == 0 else part[None, :])
    return regions
