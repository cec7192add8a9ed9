"""Multi-head attention with both of its products on codes (docs/method.md, sections 1 and 4)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import resolve_self_attn_mask
from torch import Tensor, nn

from qvit.config import QuantConfig
from qvit.errors import UnsupportedModelError
from qvit.nn.quantizer import Quantizer
from qvit.nn.recompute import recomputed
from qvit.nn.rectifier import make_rectifier


class QuantAttention(nn.Module):
    """What every attention on codes shares: rectified and quantized queries and keys, quantized values and map.

    A subclass stands for one float class. It takes over the submodules, parameters, buffers and settings of the float
    attention under the same names; its linear layers are replaced by :func:`qvit.quantize`. Both products are written
    out, so timm's fused attention cannot bypass the quantizers.

    Args:
        attention: the float module.
        config: bits and kind of rectification. ``None`` quantizes nothing: such a module computes what ``attention``
            does, and hands its queries, keys and map through modules that can be watched.
        name: the module's dotted name, for per-module bits.

    Raises:
        UnsupportedModelError: if the attention has a gate.
    """

    CONSTANT: ClassVar[tuple[str, ...]] = ()
    """Submodules that see no image: what they compute is a constant of the file, so they stay in floating point."""
    COSINE: ClassVar[float] = 0.0
    """Where queries and keys are divided by their length: the least length that they are divided by."""
    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear
    proj_drop: nn.Dropout
    attn_drop: nn.Dropout
    query_quantizer: Any
    key_quantizer: Any

    def __init__(self, attention: nn.Module, config: QuantConfig | None, name: str) -> None:
        nn.Module.__init__(self)
        if getattr(attention, "gate", None) is not None:
            raise UnsupportedModelError(
                f"Cannot quantize {name} ({type(attention).__name__}): gated attention is not supported."
            )
        settings = {key: value for key, value in vars(attention).items() if not key.startswith("_")}
        self.__dict__.update({key: value for key, value in settings.items() if key != "fused_attn"})
        self.head_dim: int = attention.proj.in_features // attention.num_heads  # type: ignore[union-attr, operator, assignment]
        for key, parameter in attention._parameters.items():
            self.register_parameter(key, parameter)
        for key, buffer in attention._buffers.items():
            self.register_buffer(key, buffer, persistent=key not in attention._non_persistent_buffers_set)
        for key, module in attention._modules.items():
            if key == "attn_drop":
                self._add_quantizers(config, name)
            self.add_module(key, module)
        if "attn_drop" not in attention._modules:
            self._add_quantizers(config, name)

    def tie(self) -> None:
        """Join the quantizers that are one; called when the linear layers are quantized."""

    def _add_quantizers(self, config: QuantConfig | None, name: str) -> None:
        def per_head(operand: str, *, signed: bool = True) -> nn.Module:
            if config is None:
                return nn.Identity()
            bits = config.bits(f"{name}.{operand}").activation
            return Quantizer(bits, (self.num_heads, 1, 1), signed=signed, offset=signed)

        rectifier = None if config is None else config.rectifier
        self.query_rectifier = make_rectifier(rectifier, self.num_heads, self.head_dim)
        self.key_rectifier = make_rectifier(rectifier, self.num_heads, self.head_dim)
        self.query_quantizer = per_head("query_quantizer")
        self.key_quantizer = per_head("key_quantizer")
        self.value_quantizer = per_head("value_quantizer")
        self.attention_quantizer = per_head("attention_quantizer", signed=False)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``(B, H, N, D)`` of ``qkv (B, N, 3 H D)``."""
        B, N, _ = qkv.shape
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def with_bias(self, qkv: Tensor) -> Tensor:
        """Return ``qkv (B, N, 3 H D)`` with the bias of queries and values, where they have parameters for it."""
        q_bias, v_bias = (getattr(self, name, None) for name in ("q_bias", "v_bias"))
        return qkv if q_bias is None or v_bias is None else qkv + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what attention gives, ``(B, N, H D)``, for q, k and v ``(B, H, N, D)`` that are ready to be rectified.

        Args:
            q: queries, normalised and rotated where they are.
            k: keys, likewise.
            v: values.
            scale: of the logits; a number or ``(H, 1, 1)``.
            bias: added to the scaled logits: it broadcasts against ``(B, H, N, N)``, or is ``(G, H, N, N)`` where the
                batch holds ``G`` windows of each image one after the other.
        """
        q, k = self.query_rectifier(q), self.key_rectifier(k)

        def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The factor goes to the queries, of which there are fewer than logits.
            logits = _ProductOfRows.apply(self.query_quantizer(q) * scale, self.key_quantizer(k))
            if bias is not None:
                windows = bias.ndim == 4 and 1 < len(bias) < len(logits)
                logits = (logits.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1) if windows else logits + bias
            attention = self.attn_drop(self.attention_quantizer(logits.softmax(dim=-1)))
            result: Tensor = attention @ self.value_quantizer(v)
            return result

        drops = self.training and self.attn_drop.p > 0
        if type(self.attention_quantizer) is nn.Identity and bias is None and isinstance(scale, float) and not drops:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)  # a float model, whose map nobody reads
        else:
            out = recomputed(products, q, k, v, random=drops)
        return out.transpose(1, 2).flatten(2)

    def project(self, out: Tensor) -> Tensor:
        """Return the output projection of ``(B, N, H D)``."""
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected


class QuantSelfAttention(QuantAttention):
    """timm's ``Attention``."""

    scale: float
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend ``(B, N, C)`` to itself; the same signature and result shape as timm's ``Attention``."""
        q, k, v = self.split(self.qkv(x))
        bias = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        return self.project(self.norm(self.attend(self.q_norm(q), self.k_norm(k), v, self.scale, bias)))


class _ProductOfRows(torch.autograd.Function):
    """``q k^T``; the gradient of ``k`` comes in rows too, not transposed as that of a matrix product's second factor.

    What follows in the backward pass then reads it in order.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        product = q @ k.transpose(-2, -1)
        # Autocast may have narrowed the operands of the product, and is off in the backward pass.
        ctx.save_for_backward(q.to(product.dtype), k.to(product.dtype))
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        q, k = ctx.saved_tensors
        return grad @ k, grad.transpose(-2, -1) @ q
