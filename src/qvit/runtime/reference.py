"""What a packed file means: the whole model in plain NumPy, every product of codes in int64.

Written to be read and to be compared against, not to be fast: the kernels are tested bit for bit against its integer
products, and the training wing's affine algebra against its logits. Equations: method.md, sections 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qvit.errors import DataError
from qvit.format.architecture import Branch, Norm
from qvit.format.packed import PackedLayer, PackedModel

Array = np.ndarray
Watch = Callable[[str, Array], None]
"""Called with the name of a quantizer and its codes, an integer array of any shape."""


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
    step, offset = float(layer.input_scale), float(layer.input_offset)
    scale, bias = layer.scale.astype(np.float64), layer.bias.astype(np.float64)
    product = integer_matmul(codes, weight)
    return (step * scale * product + offset * scale * weight.sum(axis=1) + bias).astype(np.float32)


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


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
}


def activate(x: Array, kind: str) -> Array:
    """Return the activation function called ``kind`` in :class:`qvit.format.architecture.Architecture`, float32."""
    return _ACTIVATIONS[kind](x.astype(np.float64)).astype(np.float32)


class ReferenceEngine:
    """A packed model that runs in NumPy.

    Args:
        packed: what :func:`qvit.format.packed.read_packed` returned.
        watch: sees the codes of every quantizer, by the name that its bits have in the file.
    """

    def __init__(self, packed: PackedModel, watch: Watch | None = None) -> None:
        self.packed, self.architecture, self.tensors = packed, packed.architecture, packed.tensors
        self._watch = watch

    def __call__(self, images: Array) -> Array:
        """Return logits ``(B, classes)`` of preprocessed images ``(B, C, H, W)``, both float32.

        Raises:
            DataError: for images of another shape, or with a NaN or an infinity.
        """
        net = self.architecture
        expected = (net.channels, *net.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise DataError(
                f"{net.name} takes images of shape (B, {', '.join(map(str, expected))}), not {images.shape}."
            )
        if not np.isfinite(images).all():
            raise DataError("The images hold a NaN or an infinity.")
        x = self._embed(images.astype(np.float32))
        for block in range(net.depth):
            for stage in net.stages(block):
                x = x + sum(self._branch(x, branch) for branch in stage)
        x = self._norm("norm", net.final_norm, x)
        if net.distillation_token:
            return (self._linear("head", x[:, 0]) + self._linear("head_dist", x[:, 1])) / 2
        return self._linear("head", self._norm("fc_norm", net.pool_norm, self._pool(x)))

    def _embed(self, images: Array) -> Array:
        net = self.architecture
        (rows, columns), (height, width) = net.grid, net.patch_size
        cut = images[:, :, : rows * height, : columns * width]
        patches = cut.reshape(len(cut), net.channels, rows, height, columns, width).transpose(0, 2, 4, 1, 3, 5)
        x = self._linear("patch_embed.proj", patches.reshape(len(cut), net.patches, net.patch_inputs))
        x = self._norm("patch_embed.norm", net.embed_norm, x)
        if net.position_embedding != "none":
            x = x + self.tensors["position_embedding"]
        if net.prefix_tokens:
            prefix = np.broadcast_to(self.tensors["prefix_tokens"], (len(x), net.prefix_tokens, net.embed_dim))
            x = np.concatenate([prefix, x], axis=1)
        return self._norm("norm_pre", net.pre_norm, x)

    def _branch(self, x: Array, branch: Branch) -> Array:
        run = self._attention if branch.is_attention else self._mlp
        if self.architecture.block == "post":
            return self._norm(branch.norm, self.architecture.norm, run(branch.name, x))
        return run(branch.name, self._norm(branch.norm, self.architecture.norm, x))

    def _attention(self, name: str, x: Array) -> Array:
        net = self.architecture
        B, N, _ = x.shape
        qkv = self._linear(f"{name}.qkv", x).reshape(B, N, 3, net.num_heads, net.head_dim)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        if net.qk_norm is not None:
            q, k = (self._head_norm(f"{name}.{part}", net.qk_norm, t) for part, t in (("q_norm", q), ("k_norm", k)))
        if net.rectify == "token":
            q, k = (self._rectify(f"{name}.{part}_rectifier", t) for part, t in (("query", q), ("key", k)))
        q_codes, a_q, z_q = self._operand(f"{name}.query", q)
        k_codes, a_k, z_k = self._operand(f"{name}.key", k)
        v_codes, a_v, z_v = self._operand(f"{name}.value", v)
        logits = attention_logits(q_codes, k_codes, a_q, z_q, a_k, z_k)
        a_p = self.tensors[f"{name}.attention.scale"]
        high = 2 ** self.packed.bits[f"{name}.attention"].activation - 1
        p_codes = quantize(softmax(logits * net.attention_scale), a_p[:, None, None], np.float32(0), 0, high)
        self._see(f"{name}.attention", p_codes)
        out = attention_output(p_codes, v_codes, a_p, a_v, z_v).transpose(0, 2, 1, 3).reshape(B, N, net.attention_dim)
        return self._linear(f"{name}.proj", self._norm(f"{name}.norm", net.attention_norm, out))

    def _mlp(self, name: str, x: Array) -> Array:
        net = self.architecture
        if net.mlp == "plain":
            x = activate(self._linear(f"{name}.fc1", x), net.activation)
        elif net.mlp == "swiglu":
            x = activate(self._linear(f"{name}.fc1_g", x), net.activation) * self._linear(f"{name}.fc1_x", x)
        else:
            first, second = np.split(self._linear(f"{name}.fc1", x), 2, axis=-1)
            gate, value = (second, first) if net.gate_last else (first, second)
            x = activate(gate, net.activation) * value
        return self._linear(f"{name}.fc2", self._norm(f"{name}.norm", net.mlp_norm, x))

    def _pool(self, x: Array) -> Array:
        net = self.architecture
        if net.pool == "token":
            return x[:, 0]
        x = x[:, net.pool_skip :]
        average, largest = x.mean(axis=1, dtype=np.float64).astype(np.float32), x.max(axis=1)
        return {"avg": average, "max": largest, "avgmax": 0.5 * (average + largest)}[net.pool]

    def _linear(self, name: str, x: Array) -> Array:
        layer = self.packed.layer(name)
        codes = quantize(x, layer.input_scale, layer.input_offset, *signed_range(layer.bits.activation))
        self._see(name, codes)
        return linear_codes(codes, layer)

    def _operand(self, name: str, x: Array) -> tuple[Array, Array, Array]:
        """Return codes, scales and offsets of one operand ``(B, H, N, D)`` of the attention products."""
        scale, offset = self.tensors[f"{name}.scale"], self.tensors[f"{name}.offset"]
        low, high = signed_range(self.packed.bits[name].activation)
        codes = quantize(x, scale[:, None, None], offset[:, None, None], low, high)
        self._see(name, codes)
        return codes, scale, offset

    def _norm(self, name: str, norm: Norm | None, x: Array) -> Array:
        if norm is None:
            return x
        return normalize(x, norm, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _head_norm(self, name: str, norm: Norm, x: Array) -> Array:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return normalize(x, norm, weight[:, None], bias[:, None])

    def _rectify(self, name: str, x: Array) -> Array:
        return rectify(x, self.tensors[f"{name}.gamma"], self.tensors[f"{name}.beta"])

    def _see(self, name: str, codes: Array) -> None:
        if self._watch is not None:
            self._watch(name, codes)
