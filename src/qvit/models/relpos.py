"""timm's ``VisionTransformerRelPos``: a bias by relative position from a table or a small MLP, without windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from timm.layers import RelPosBias, RelPosMlp
from timm.models import vision_transformer_relpos as relpos
from torch import nn

from qvit.format.branches import Residual
from qvit.format.ops import Operation, Pool
from qvit.models import parts
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, Values, refuse, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.modes import evaluating
from qvit.nn.positions import QuantRelPosAttention

MODELS: tuple[type[nn.Module], ...] = (relpos.VisionTransformerRelPos,)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {relpos.RelPosAttention: QuantRelPosAttention}
ENDS = parts.ENDS
OWNERS: tuple[type[nn.Module], ...] = (RelPosBias,)
CONSTANT: tuple[str, ...] = ("shared_rel_pos",)
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
    yield parts.tokens(to, [model.cls_token], None, 0)
    for name, _ in model.blocks.named_children():
        yield from _block(to, f"blocks.{name}")
    yield from parts.norm(to, "norm")
    yield Pool(model.global_pool, skip=0 if model.global_pool == "token" else model.num_prefix_tokens)
    yield from parts.norm(to, "fc_norm")
    yield from parts.classify(to, "head")


def _block(to: Lowering, name: str) -> Iterator[Operation]:
    block = to.known(name, relpos.RelPosBlock, relpos.ResPostRelPosBlock)
    post = type(block) is relpos.ResPostRelPosBlock
    scales = (None, None) if post else (f"{name}.ls1", f"{name}.ls2")
    parts.need_norms(block, name)
    table = block.attn.rel_pos
    bias = _bias("shared_rel_pos", to.model.shared_rel_pos) if table is None else _bias(f"{name}.attn.rel_pos", table)
    yield Residual((attention(to, f"{name}.attn", f"{name}.norm1", scales[0], bias=bias),), post)
    yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2", scales[1]),), post)


def _bias(name: str, module: Any) -> Values | None:
    """Return what makes the table of relative positions, with three rows for a class token."""
    if module is None:
        return None
    if type(module) not in (RelPosBias, RelPosMlp):
        refuse(name, module, "a packed file knows RelPosBias, RelPosMlp")

    def table() -> np.ndarray:
        if isinstance(module, RelPosBias):
            return wide(module.relative_position_bias_table)
        with evaluating(module):
            values = module.bias_act(module.mlp(module.rel_coords_log)).view(-1, module.num_heads)
        rows = wide(values) * (module.bias_gain or 1)
        return np.concatenate([rows, np.zeros((3, module.num_heads))]) if module.prefix_tokens else rows

    return table
