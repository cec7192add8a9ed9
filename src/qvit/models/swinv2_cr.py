"""timm's ``SwinTransformerV2Cr``: Swin v2 with patches merged as in the first Swin, and norms on the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models import swin_transformer_v2_cr as swinv2_cr
from torch import nn

from qvit.format.branches import Residual
from qvit.format.ops import Merge, Operation, Tokens
from qvit.models import parts, swin
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.modes import evaluating
from qvit.nn.windows import QuantLogCosineAttention

MODELS: tuple[type[nn.Module], ...] = (swinv2_cr.SwinTransformerV2Cr,)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {
    swinv2_cr.WindowMultiHeadAttention: QuantLogCosineAttention,
}
ENDS = swin.ENDS
OWNERS: tuple[type[nn.Module], ...] = ()
CONSTANT: tuple[str, ...] = ()


def blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of all stages, in the order they run."""
    return [block for stage in model.stages for block in stage.blocks]


def lower(to: Lowering) -> Iterator[Operation]:
    """Yield the operations of a model, or refuse what a packed file cannot say.

    Raises:
        UnsupportedModelError: naming the module.
        ConfigError: if the images have another size than the model.
    """
    model: Any = to.model
    yield from parts.embed(to, swinv2_cr.PatchEmbed)
    yield Tokens()
    grid = parts.grid(to)
    for index in range(len(model.stages)):
        name = f"stages.{index}"
        stage = to.known(name, swinv2_cr.SwinTransformerV2CrStage)
        if not isinstance(stage.downsample, nn.Identity):
            merging = f"{name}.downsample"
            swin.check_merge(merging, to.known(merging, swinv2_cr.PatchMerging), grid)
            yield Merge(to.layer(f"{merging}.reduction"), to.norm(f"{merging}.norm"))
            grid = grid[0] // 2, grid[1] // 2
        for number in range(len(stage.blocks)):
            yield from _block(to, f"{name}.blocks.{number}", grid)
    yield from swin.head(to)


def _block(to: Lowering, name: str, grid: tuple[int, int]) -> Iterator[Operation]:
    block = to.known(name, swinv2_cr.SwinTransformerV2CrBlock)
    parts.need_norms(block, name)
    window, shift = swin.windows(name, block, grid)

    quantized: Any = block.attn

    def bias() -> Any:
        with evaluating(quantized):  # its MLP drops values in training
            return wide(quantized.bias_table())

    branch = attention(to, f"{name}.attn", f"{name}.norm1", window=window, shift=shift, bias=bias)
    yield Residual((branch,), post=True)
    yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2"),), post=True)
    yield from parts.norm(to, f"{name}.norm3")
