"""A quantized attention becomes an operation of the program, whatever kind it is.

The order is always norm, rotation, rectifier, quantizer (docs/method.md, section 4). A ``head`` rectifier is affine in
evaluation: it is folded into the query and key norms, else into qkv, and stands in the file as it is only where a
rotation lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from qvit.format.branches import Attention, AttentionPool, Rotary
from qvit.format.ops import OPERANDS, Norm
from qvit.models.lowering import Affine, Lowering, Values, refuse, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectifier import EPS, HeadRectifier, TokenRectifier

Maker = Callable[[], Affine]


def attention(
    to: Lowering,
    name: str,
    norm: str,
    layer_scale: str | None = None,
    *,
    rotary: Rotary | None = None,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    bias: Values | None = None,
) -> Attention:
    """Return an attention of qvit's.

    Args:
        to: takes the tensors.
        name: of the attention.
        norm: of the norm before it (or after it, as the residual says).
        layer_scale: of the LayerScale or the parameter that its output is multiplied with, if there is one.
        rotary: of its queries and keys; the caller stores the tables.
        window: inside which it stays.
        shift: of the windows.
        bias: makes the relative position bias ``(rows, H)``, if it has one.
    """
    module: Any = to.module(name)
    if not isinstance(module, QuantAttention):
        refuse(name, module, "it is no attention that qvit knows")
    sizes = module.num_heads, module.head_dim
    if hasattr(module, "softmax"):
        to.known(f"{name}.softmax", nn.Softmax)
    kind = _rectifier(name, module)
    norms: dict[str, Norm | None] = {}
    folded: dict[str, Maker] = {}
    for operand in ("query", "key"):
        affine = _head_affine(to, f"{name}.{operand}_rectifier") if kind == "head" else None
        if affine is not None and rotary is not None:
            _store_affine(to, f"{name}.{operand}_rectifier", affine)
            affine = None
        norms[operand] = _operand_norm(to, name, operand, module, affine or _identity(sizes))
        if norms[operand] is None and affine is not None:
            folded[operand] = affine
        if kind == "token":
            _token_rectifier(to, f"{name}.{operand}_rectifier", sizes)
    _store_operands(to, name, module)
    scale = getattr(module, "scale", None)
    if scale is None:
        logit_factor: Any = module.logit_factor
        to.store(f"{name}.logit_scale", lambda: wide(logit_factor()).reshape(-1))
    if bias is not None:
        to.store(f"{name}.relative_position_bias", bias)
    fused = getattr(module, "qkv", None) is not None
    return Attention(
        name=name,
        heads=module.num_heads,
        head_dim=module.head_dim,
        scale=None if scale is None else float(scale),
        norm=to.norm(norm),
        qkv=to.layer(
            f"{name}.qkv",
            _qkv_affine(folded, sizes) if folded else None,
            _qkv_bias(module, sizes[0] * sizes[1]),
            None if fused else [f"{name}.{part}_proj" for part in "qkv"],
        ),
        query_norm=norms["query"],
        key_norm=norms["key"],
        rotary=rotary,
        rectifier="affine" if kind == "head" and rotary is not None else "token" if kind == "token" else None,
        **_bits(module),
        window=window,
        shift=shift,
        bias=None if bias is None else "relative_position",
        inner_norm=to.norm(f"{name}.norm") if hasattr(module, "norm") else None,
        proj=to.layer(f"{name}.proj", to.layer_scale(layer_scale)),
    )


def attention_pool(to: Lowering, name: str) -> AttentionPool:
    """Return timm's ``AttentionPoolLatent`` as :class:`qvit.nn.pool.QuantAttentionPool` runs it, without its MLP."""
    module: Any = to.module(name)
    if not isinstance(module, QuantAttention):
        refuse(name, module, "it is no attention pooling that qvit knows")
    if module.latent_len != 1 or module.pos_embed is not None or module.pool != "token":
        refuse(name, module, "a packed file pools with one latent query, without a position embedding")
    sizes = module.num_heads, module.head_dim
    _store_operands(to, name, module)
    to.store(f"{name}.latent", lambda: wide(module.query()).reshape(sizes))
    return AttentionPool(
        name=name,
        heads=module.num_heads,
        head_dim=module.head_dim,
        scale=float(module.scale),
        kv=to.layer(f"{name}.kv"),
        **_bits(module),
        proj=to.layer(f"{name}.proj"),
        key_norm=_operand_norm(to, name, "key", module, _identity(sizes)),
    )


def _operand_norm(to: Lowering, name: str, operand: str, module: Any, affine: Maker) -> Norm | None:
    """Return the norm of queries or keys, whose weight the file has per head and channel."""
    norm = f"{name}.{operand[0]}_norm"
    if hasattr(module, f"{operand[0]}_norm"):
        return to.norm(norm, affine)
    if not module.COSINE:
        return None

    def weight_and_bias() -> Affine:
        factor, shift = affine()
        return factor / module.head_dim**0.5, shift

    # x / |x| is x over the root of its mean square, over the root of its length.
    to.store(f"{norm}.weight", lambda: weight_and_bias()[0])
    to.store(f"{norm}.bias", lambda: weight_and_bias()[1])
    return Norm(norm, "rms", module.COSINE**2 / module.head_dim)


def _store_operands(to: Lowering, name: str, module: Any) -> None:
    for operand in OPERANDS:
        quantizer: Quantizer = getattr(module, f"{_module_name(operand)}_quantizer")
        to.store(f"{name}.{operand}.scale", lambda quantizer=quantizer: wide(quantizer.scale).reshape(-1))  # type: ignore[misc]
        if quantizer.offset is not None:
            to.store(f"{name}.{operand}.offset", lambda quantizer=quantizer: wide(quantizer.offset).reshape(-1))  # type: ignore[misc]


def _bits(module: Any) -> dict[str, int]:
    return {operand: getattr(module, f"{_module_name(operand)}_quantizer").bits for operand in OPERANDS}


def _module_name(operand: str) -> str:
    """Return what an operand is called in :class:`QuantAttention`."""
    return "attention" if operand == "map" else operand


def _qkv_bias(module: Any, width: int) -> Values | None:
    """Return what makes the bias of qkv where queries and values have parameters for it, and keys none."""
    if getattr(module, "q_bias", None) is None:
        return None
    return lambda: np.concatenate([wide(module.q_bias), np.zeros(width), wide(module.v_bias)])


def _rectifier(name: str, module: QuantAttention) -> str | None:
    query, key = module.query_rectifier, module.key_rectifier
    kinds = {HeadRectifier: "head", TokenRectifier: "token", nn.Identity: None}
    if type(query) not in kinds or type(key) is not type(query):
        refuse(f"{name}.query_rectifier", query, "it is no rectifier of qvit's, or another than the keys'")
    return kinds[type(query)]


def _token_rectifier(to: Lowering, name: str, sizes: Sequence[int]) -> None:
    module = to.module(name)
    to.store(f"{name}.gamma", lambda: wide(module.gamma).reshape(sizes))
    to.store(f"{name}.beta", lambda: wide(module.beta).reshape(sizes))


def _head_affine(to: Lowering, name: str) -> Maker:
    """Return what makes factor and shift ``(H, D)`` of a ``head`` rectifier: ``q~ = factor * q + shift``."""
    rectifier = to.module(name)

    def affine() -> Affine:
        gamma, beta = wide(rectifier.gamma)[:, 0], wide(rectifier.beta)[:, 0]
        mean, variance = wide(rectifier.running_mean)[:, 0], wide(rectifier.running_var)[:, 0]
        divisor = gamma * np.sqrt(variance + EPS)
        if not divisor.all():
            refuse(name, rectifier, "its gamma holds a 0, by which it divides")
        return 1 / divisor, (beta - mean) / divisor

    return affine


def _store_affine(to: Lowering, name: str, affine: Maker) -> None:
    to.store(f"{name}.factor", lambda: affine()[0])
    to.store(f"{name}.shift", lambda: affine()[1])


def _identity(sizes: Sequence[int]) -> Maker:
    return lambda: (np.ones(sizes), np.zeros(sizes))


def _qkv_affine(folded: Mapping[str, Maker], sizes: Sequence[int]) -> Maker:
    """Return what makes the affine map of qkv, from those of the queries and keys ``(H, D)`` that have one."""

    def affine() -> Affine:
        parts = [folded.get(operand, _identity(sizes))() for operand in ("query", "key", "value")]
        factors, shifts = (np.concatenate([part.reshape(-1) for part in side]) for side in zip(*parts, strict=True))
        return factors, shifts

    return affine
