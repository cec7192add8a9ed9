"""timm's ``Beit``: BEiT and BEiT v2, a bias by relative position without windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from timm.models import beit
from torch import nn

from qvit.format.branches import Residual
from qvit.format.ops import Operation, Pool
from qvit.models import parts
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, Values, refuse, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.positions import QuantBeitAttention

MODELS: tuple[type[nn.Module], ...] = (beit.Beit,)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {beit.Attention: QuantBeitAttention}
ENDS = parts.ENDS
OWNERS: tuple[type[nn.Module], ...] = (beit.Block,)
CONSTANT: tuple[str, ...] = ("rel_pos_bias",)
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
    yield parts.tokens(to, [model.cls_token], model.pos_embed, 1)
    for name, _ in model.blocks.named_children():
        yield from _block(to, f"blocks.{name}")
    yield from parts.norm(to, "norm")
    yield Pool(model.global_pool, skip=0 if model.global_pool == "token" else 1)
    yield from parts.norm(to, "fc_norm")
    yield from parts.classify(to, "head")


def _block(to: Lowering, name: str) -> Iterator[Operation]:
    block = to.known(name, beit.Block)
    parts.need_norms(block, name)
    if (block.gamma_1 is None) != (block.gamma_2 is None):
        refuse(name, block, "it has one of gamma_1 and gamma_2, and timm multiplies by both or by none")
    bias = _bias(block.attn, to.model.rel_pos_bias)
    yield Residual((attention(to, f"{name}.attn", f"{name}.norm1", f"{name}.gamma_1", bias=bias),))
    yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2", f"{name}.gamma_2"),))


def _bias(block_table: Any, model_table: Any) -> Values | None:
    """Return what makes the table of relative positions: that of the block, that of all blocks, or their sum."""
    owners = (owner for owner in (block_table, model_table) if owner is not None)
    tables = [owner.relative_position_bias_table for owner in owners if owner.relative_position_bias_table is not None]
    return (lambda: np.sum([wide(table) for table in tables], axis=0)) if tables else None
