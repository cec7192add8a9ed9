"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder and others with rotated queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from timm.layers import AttentionPoolLatent, AttentionRope
from timm.models import eva
from torch import nn

from qvit.format.branches import Residual, Rotary
from qvit.format.ops import Operation, Pool
from qvit.models import parts
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, refuse, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.modes import evaluating
from qvit.nn.pool import QuantAttentionPool
from qvit.nn.rotary import QuantRotaryAttention

MODELS: tuple[type[nn.Module], ...] = (eva.Eva,)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {
    eva.EvaAttention: QuantRotaryAttention,
    AttentionRope: QuantRotaryAttention,
    AttentionPoolLatent: QuantAttentionPool,
}
ENDS = parts.ENDS
OWNERS: tuple[type[nn.Module], ...] = (eva.EvaBlock,)
CONSTANT: tuple[str, ...] = ("rope",)
blocks = parts.blocks


def lower(to: Lowering) -> Iterator[Operation]:
    """Yield the operations of a model, or refuse what a packed file cannot say.

    Raises:
        UnsupportedModelError: naming the module.
        ConfigError: if the images have another size than the model.
    """
    model: Any = to.model
    yield from parts.embed(to)
    parts.check_blocks_and_pool(model)
    prefix = model.num_prefix_tokens
    covered = 0 if model.no_embed_class else prefix
    yield parts.tokens(to, [model.cls_token, model.reg_token], model.pos_embed, covered)
    yield from parts.norm(to, "norm_pre")
    for index, (name, _) in enumerate(model.blocks.named_children()):
        yield from _block(to, f"blocks.{name}", index)
    yield from parts.norm(to, "norm")
    if model.attn_pool is not None:
        yield from parts.pool_by_attention(to, "attn_pool")
    else:
        yield Pool(model.global_pool, skip=0 if model.global_pool == "token" else prefix)
    yield from parts.norm(to, "fc_norm")
    yield from parts.classify(to, "head")


def _block(to: Lowering, name: str, index: int) -> Iterator[Operation]:
    block = to.known(name, eva.EvaBlock, eva.EvaBlockPostNorm)
    post = type(block) is eva.EvaBlockPostNorm
    scales = (None, None) if post else (f"{name}.gamma_1", f"{name}.gamma_2")
    parts.need_norms(block, name)
    rotary = _rotary(to, block.attn, index)
    yield Residual((attention(to, f"{name}.attn", f"{name}.norm1", scales[0], rotary=rotary),), post)
    yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2", scales[1]),), post)


def _rotary(to: Lowering, attention: Any, index: int) -> Rotary | None:
    """Return the rotation of a block, and store its tables: those of the model, or of mixed ones the block's own."""
    model: Any = to.model
    if model.rope is None:
        return None
    halves = bool(attention.rotate_half)
    if halves != bool(model.blocks[0].attn.rotate_half):
        refuse(f"blocks.{index}.attn", attention, "it rotates other channels together than the first block")
    name, heads = (f"rope.{index}", int(attention.num_heads)) if model.rope_mixed else ("rope", 1)

    def table(part: int) -> np.ndarray:
        with evaluating(model.rope):
            values = model.rope.get_embed(shape=list(parts.grid(to))) if _takes_shape(model) else model.rope.get_embed()
        values = wide(values[index] if model.rope_mixed else values[None]).reshape(heads, -1, 2, attention.head_dim)
        full = values[:, :, part]
        half = attention.head_dim // 2
        first, second = (full[..., :half], full[..., half:]) if halves else (full[..., ::2], full[..., 1::2])
        if not np.array_equal(first, second):
            refuse("rope", model.rope, "channels that are rotated together have different angles")
        return first

    to.store(f"{name}.sin", lambda: table(0))
    to.store(f"{name}.cos", lambda: table(1))
    return Rotary(name, "halves" if halves else "pairs", heads)


def _takes_shape(model: Any) -> bool:
    """Return whether timm tells the rotation the shape of the grid, as :meth:`timm.models.Eva._pos_embed` does."""
    return bool(model.dynamic_img_size) or not hasattr(model.rope, "feat_shape")
