"""timm's ``SwinTransformerV2``: cosine attention inside shifted windows, norms after the branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models import swin_transformer_v2 as swinv2
from torch import nn

from qvit.format.branches import Residual
from qvit.format.ops import Merge, Operation
from qvit.format.program import Program
from qvit.models import parts, swin
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.windows import QuantCosineAttention

MODELS: tuple[type[nn.Module], ...] = (swinv2.SwinTransformerV2,)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {swinv2.WindowAttention: QuantCosineAttention}
ENDS = swin.ENDS
OWNERS: tuple[type[nn.Module], ...] = ()
CONSTANT: tuple[str, ...] = ()
blocks = swin.blocks


def lower(to: Lowering) -> Iterator[Operation]:
    """Yield the operations of a model, or refuse what a packed file cannot say.

    Raises:
        UnsupportedModelError: naming the module.
        ConfigError: if the images have another size than the model.
    """
    yield from swin.stages(to, swinv2.SwinTransformerV2Stage, _merge, _block)
    yield from parts.norm(to, "norm")
    yield from swin.head(to)


def _merge(to: Lowering, name: str, grid: tuple[int, int]) -> Iterator[Operation]:
    module = to.known(name, swinv2.PatchMerging)
    swin.check_merge(name, module, grid)
    yield Merge(to.layer(f"{name}.reduction"))
    yield from parts.norm(to, f"{name}.norm")


def _block(to: Lowering, name: str, grid: tuple[int, int]) -> Iterator[Operation]:
    block = to.known(name, swinv2.SwinTransformerV2Block)
    parts.need_norms(block, name)
    window, shift = swin.windows(name, block, grid)
    table: Any = block.attn.bias_table
    branch = attention(
        to,
        f"{name}.attn",
        f"{name}.norm1",
        window=window,
        shift=shift,
        bias=lambda: wide(table()),
    )
    yield Residual((branch,), post=True)
    yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2"),), post=True)


def float_model(program: Program) -> nn.Module:
    """Return timm's float model of a program, with random weights, in evaluation mode."""
    return swin.float_model(program, swinv2.SwinTransformerV2)
