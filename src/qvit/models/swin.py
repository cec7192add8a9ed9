"""timm's ``SwinTransformer``: attention inside shifted windows, patches merged between the stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d, adaptive_avgmax_pool
from timm.models import swin_transformer as swin
from torch import nn

from qvit.format.branches import Attention, Mlp, Residual
from qvit.format.ops import Classify, Embed, Merge, Norm, Operation, Pool, Tokens
from qvit.format.program import Program
from qvit.models import parts
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, refuse, wide
from qvit.nn.attention import QuantAttention
from qvit.nn.windows import QuantWindowAttention

MODELS: tuple[type[nn.Module], ...] = (swin.SwinTransformer,)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {swin.WindowAttention: QuantWindowAttention}
ENDS = ("patch_embed.*", "head.fc")
OWNERS: tuple[type[nn.Module], ...] = ()
CONSTANT: tuple[str, ...] = ()
LowerMerge = Callable[[Lowering, str, tuple[int, int]], Iterator[Operation]]
LowerBlock = Callable[[Lowering, str, tuple[int, int]], Iterator[Operation]]
_POOLINGS: dict[str, tuple[type[nn.Module], ...]] = {
    "avg": (adaptive_avgmax_pool.FastAdaptiveAvgPool, nn.AdaptiveAvgPool2d),
    "max": (adaptive_avgmax_pool.FastAdaptiveMaxPool, nn.AdaptiveMaxPool2d),
    "avgmax": (adaptive_avgmax_pool.FastAdaptiveAvgMaxPool, adaptive_avgmax_pool.AdaptiveAvgMaxPool2d),
}
"""The classes of timm's poolings: channels last, as in Swin and Swin v2, and first."""
POOLS = tuple(_POOLINGS)


def blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of all stages, in the order they run."""
    return [block for stage in model.layers for block in stage.blocks]


def lower(to: Lowering) -> Iterator[Operation]:
    """Yield the operations of a model, or refuse what a packed file cannot say.

    Raises:
        UnsupportedModelError: naming the module.
        ConfigError: if the images have another size than the model.
    """
    yield from stages(to, swin.SwinTransformerStage, _merge, _block)
    yield from parts.norm(to, "norm")
    yield from head(to)


def stages(to: Lowering, kind: type[nn.Module], merge: LowerMerge, lower_block: LowerBlock) -> Iterator[Operation]:
    """Yield what comes before the last norm: patches, then merging, where there is any, and blocks of every stage.

    Args:
        to: takes the tensors.
        kind: class of a stage.
        merge: yields the operations of merging patches, of a name and the grid before it.
        lower_block: yields those of a block, of a name and its grid.
    """
    model: Any = to.model
    yield from parts.embed(to)
    yield Tokens()
    grid = parts.grid(to)
    for index in range(len(model.layers)):
        name = f"layers.{index}"
        stage = to.known(name, kind)
        if not isinstance(stage.downsample, nn.Identity):
            yield from merge(to, f"{name}.downsample", grid)
            grid = grid[0] // 2, grid[1] // 2
        for number in range(len(stage.blocks)):
            yield from lower_block(to, f"{name}.blocks.{number}", grid)


def _merge(to: Lowering, name: str, grid: tuple[int, int]) -> Iterator[Operation]:
    module = to.known(name, swin.PatchMerging)
    check_merge(name, module, grid)
    yield Merge(to.layer(f"{name}.reduction"), to.norm(f"{name}.norm"))


def _block(to: Lowering, name: str, grid: tuple[int, int]) -> Iterator[Operation]:
    block = to.known(name, swin.SwinTransformerBlock)
    parts.need_norms(block, name)
    table = block.attn.relative_position_bias_table
    window, shift = windows(name, block, grid)
    yield Residual(
        (attention(to, f"{name}.attn", f"{name}.norm1", window=window, shift=shift, bias=lambda: wide(table)),)
    )
    yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2"),))


def windows(name: str, block: Any, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return window and shift of a block of Swin's or Swin v2's.

    Raises:
        UnsupportedModelError: if the windows do not divide the grid, which timm would pad.
    """
    window = int(block.window_size[0]), int(block.window_size[1])
    if grid[0] % window[0] or grid[1] % window[1]:
        refuse(
            f"{name}.attn",
            block.attn,
            f"its windows of {window} patches do not divide the grid of {grid}, at this size",
        )
    shift = (int(block.shift_size[0]), int(block.shift_size[1]))
    if not getattr(block, "dynamic_mask", False) and (block.attn_mask is not None) != any(shift):
        refuse(name, block, f"its attn_mask is not that of its shift_size {shift}")
    return window, shift


def check_merge(name: str, module: nn.Module, grid: tuple[int, int]) -> None:
    """Refuse to merge an odd number of patches, which timm would pad.

    Raises:
        UnsupportedModelError: naming the module.
    """
    if grid[0] % 2 or grid[1] % 2:
        refuse(name, module, f"a grid of {grid} patches cannot be merged two by two, at this size")


def head(to: Lowering) -> Iterator[Operation]:
    """Yield timm's ``ClassifierHead``: pooling and classifier."""
    module = to.known("head", ClassifierHead)
    pool = to.known("head.global_pool", SelectAdaptivePool2d).pool_type
    if pool not in POOLS:
        refuse("head", module, f"it pools by {pool!r}; a packed file knows {', '.join(POOLS)}")
    to.known("head.global_pool.pool", *_POOLINGS[pool])
    to.known("head.global_pool.flatten", nn.Identity, nn.Flatten)
    yield Pool(pool)
    yield from parts.classify(to, "head.fc")


def float_model(program: Program, kind: Any = swin.SwinTransformer) -> nn.Module:
    """Return timm's float model of a program with windows, with random weights, in evaluation mode.

    Args:
        program: of one of :data:`MODELS`, or of another class with the same arguments.
        kind: the class.
    """
    operations = list(program.walk())
    embed = next(operation for operation, _ in operations if isinstance(operation, Embed))
    norm = next(operation for operation, _ in operations if isinstance(operation, Norm))
    pool = next(operation for operation, _ in operations if isinstance(operation, Pool))
    classify = next((operation for operation, _ in operations if isinstance(operation, Classify)), None)
    stages: list[list[tuple[Attention, Mlp]]] = [[]]
    attentions: list[Attention] = []
    for operation, _ in operations:
        if isinstance(operation, Merge):
            stages.append([])
        elif isinstance(operation, Residual):
            (branch,) = operation.branches
            if isinstance(branch, Attention):
                attentions.append(branch)
            else:
                stages[-1].append((attentions[-1], branch))
    firsts = [stage[0] for stage in stages]
    first = kind is swin.SwinTransformer  # the second has one ratio, and heads that fill the width
    ratios = [(mlp.hidden + 0.5) / mlp.fc1.inputs for _, mlp in firsts]  # timm rounds dim * mlp_ratio down
    torch.manual_seed(0)
    model: nn.Module = kind(
        img_size=program.input[1:],
        patch_size=embed.patch,
        in_chans=program.input[0],
        num_classes=classify.heads[0].outputs if classify is not None else 0,
        global_pool=pool.kind,
        embed_dim=embed.layer.outputs,
        depths=[len(stage) for stage in stages],
        num_heads=[attention.heads for attention, _ in firsts],
        window_size=[attention.window for attention, _ in firsts],
        mlp_ratio=ratios if first else ratios[-1],
        norm_layer=functools.partial({"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm.kind], eps=norm.eps),
        **({"head_dim": [attention.head_dim for attention, _ in firsts]} if first else {}),
    )
    return model.eval()
