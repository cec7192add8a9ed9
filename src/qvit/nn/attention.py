"""Multi-head attention with both of its products on codes (method.md, sections 1 and 2)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn

from qvit.config import QuantConfig
from qvit.nn.quantizer import Quantizer
from qvit.nn.recompute import recomputed
from qvit.nn.rectify import make_rectifier


class QuantAttention(nn.Module):
    """timm's ``Attention`` with rectified and quantized queries and keys, quantized values and attention map.

    Takes over the submodules of the float attention under the same names; its linear layers are replaced by
    :func:`qvit.quantize`. Both products are written out, so timm's fused attention cannot bypass the quantizers.

    Args:
        attention: the float module.
        config: bits and kind of rectification.
        name: the module's dotted name, for per-module bits.
    """

    def __init__(self, attention: Attention, config: QuantConfig, name: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.qkv = attention.qkv
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.query_rectifier = make_rectifier(config.rectify, self.num_heads, self.head_dim)
        self.key_rectifier = make_rectifier(config.rectify, self.num_heads, self.head_dim)

        def per_head(operand: str, *, signed: bool = True) -> Quantizer:
            bits = config.bits(f"{name}.{operand}").activation
            return Quantizer(bits, (self.num_heads, 1, 1), signed=signed, offset=signed)

        self.query_quantizer = per_head("query_quantizer")
        self.key_quantizer = per_head("key_quantizer")
        self.value_quantizer = per_head("value_quantizer")
        self.attention_quantizer = per_head("attention_quantizer", signed=False)
        self.attn_drop, self.norm = attention.attn_drop, attention.norm
        self.proj, self.proj_drop = attention.proj, attention.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend ``(B, N, C)`` to itself; the same signature and result shape as timm's ``Attention``."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.query_rectifier(self.q_norm(q)), self.key_rectifier(self.k_norm(k))

        def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The factor goes to the queries, of which there are fewer than logits.
            logits = _ProductOfRows.apply(self.query_quantizer(q) * self.scale, self.key_quantizer(k))
            logits = maybe_add_mask(logits, resolve_self_attn_mask(N, logits, attn_mask, is_causal))
            attention = self.attn_drop(self.attention_quantizer(logits.softmax(dim=-1)))
            result: Tensor = attention @ self.value_quantizer(v)
            return result

        drops = self.training and self.attn_drop.p > 0
        out = recomputed(products, q, k, v, random=drops).transpose(1, 2)
        out = out.reshape(B, N, self.num_heads * self.head_dim)
        projected: Tensor = self.proj_drop(self.proj(self.norm(out)))
        return projected


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


def attention_layers(model: nn.Module) -> list[Any]:
    """Return the attention modules of a float or quantized vision transformer, in the order they run."""
    return [module for module in model.modules() if isinstance(module, (Attention, QuantAttention))]


def run_with_queries(model: nn.Module, images: Tensor) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Return ``model(images)``, and the queries and keys of every attention layer, ``(B, H, N, D)`` each.

    Of a float model they are what enters the attention product; of a quantized one the rectified q~ and k~ before they
    are quantized.

    While the model runs, other modules stand in the place of those that make queries and keys; nothing of it is left
    afterwards. Hooks would do the same in eager mode, but compiled code does not notice that hooks were added to a
    module, and does notice that a module is of another class.

    Args:
        model: a float or quantized vision transformer, maybe compiled or in a wrapper such as DDP.
        images: ``(B, C, H, W)``.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for layer in attention_layers(model):
            names = ("query_rectifier", "key_rectifier") if isinstance(layer, QuantAttention) else ("q_norm", "k_norm")
            for name, outputs in zip(names, (queries, keys), strict=True):
                source = getattr(layer, name)
                replaced.append((layer, name, source))
                setattr(layer, name, _Recorded(source, outputs))
        return model(images), queries, keys
    finally:
        for layer, name, source in replaced:
            setattr(layer, name, source)


class _Recorded(nn.Module):
    """``source``, whose outputs are kept in a list too."""

    def __init__(self, source: nn.Module, outputs: list[Tensor]) -> None:
        super().__init__()
        self.source, self.outputs = source, outputs

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.source(x)
        self.outputs.append(output)
        return output
