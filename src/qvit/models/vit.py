"""timm's ``VisionTransformer`` and its distilled variant: ViT, DeiT, AugReg, CLIP, SigLIP, DINOv2, AIMv2, ...."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import timm.layers
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import nn

from qvit.errors import ConfigError, UnsupportedModelError
from qvit.format.branches import Attention, Mlp, Residual
from qvit.format.ops import Classify, Embed, Norm, Operation, Pool, Tokens
from qvit.format.program import Program
from qvit.models.lowering import Lowering, refuse, wide

MODELS: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)
_POOLS = ("token", "avg", "avgmax", "max")


def lower(to: Lowering) -> Iterator[Operation]:
    """Yield the operations of a model, or refuse what a packed file cannot say.

    Raises:
        UnsupportedModelError: naming the module.
        ConfigError: if the images have another size than the model.
    """
    model: Any = to.model
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        refuse("patch_embed", embed, "only timm's plain PatchEmbed is supported")
    proj = embed.proj
    plain = (proj.stride, proj.padding, proj.dilation, proj.groups) == (proj.kernel_size, (0, 0), (1, 1), 1)
    if not plain or proj.kernel_size != tuple(embed.patch_size):
        refuse("patch_embed.proj", proj, "its patches overlap or are padded")
    _check_image_size(model, to.image_size)
    if model.attn_pool is not None or model.global_pool not in _POOLS:
        refuse("the model", model, f"it pools by {model.global_pool!r}; a packed file knows {', '.join(_POOLS)}")
    if not len(model.blocks):
        refuse("blocks", model.blocks, "it is empty")
    yield Embed((int(embed.patch_size[0]), int(embed.patch_size[1])), to.layer("patch_embed.proj"))
    yield from _norm(to, "patch_embed.norm")
    tokens = _tokens(to)
    yield tokens
    yield from _norm(to, "norm_pre")
    for name, block in model.blocks.named_children():
        yield from _block(to, f"blocks.{name}", block)
    yield from _norm(to, "norm")
    # A distilled model looks at neither fc_norm nor its registers.
    distilled = isinstance(model, VisionTransformerDistilled)
    skip = 0 if model.global_pool == "token" or model.pool_include_prefix else tokens.prefix
    yield Pool(model.global_pool, tokens=1 + distilled, skip=skip)
    if not distilled:
        yield from _norm(to, "fc_norm")
    heads = ("head", "head_dist") if distilled else ("head",)
    if not isinstance(model.head, nn.Identity):
        yield Classify(tuple(to.layer(name) for name in heads))


def _norm(to: Lowering, name: str) -> Iterator[Norm]:
    norm = to.norm(name)
    if norm is not None:
        yield norm


def _block(to: Lowering, name: str, block: nn.Module) -> Iterator[Residual]:
    if type(block) is ParallelThingsBlock:
        attentions = [f"{name}.attns.{index}" for index in range(len(block.attns))]
        mlps = [f"{name}.ffns.{index}" for index in range(len(block.ffns))]
        yield Residual(tuple(to.attention(f"{path}.attn", f"{path}.norm", f"{path}.ls") for path in attentions))
        yield Residual(tuple(to.mlp(f"{path}.mlp", f"{path}.norm", f"{path}.ls") for path in mlps))
    elif type(block) in (Block, ResPostBlock):
        post = type(block) is ResPostBlock
        scales = (None, None) if post else (f"{name}.ls1", f"{name}.ls2")
        for norm in ("norm1", "norm2"):
            if isinstance(getattr(block, norm), nn.Identity):
                refuse(f"{name}.{norm}", getattr(block, norm), "a block needs its norms")
        yield Residual((to.attention(f"{name}.attn", f"{name}.norm1", scales[0]),), post)
        yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2", scales[1]),), post)
    else:
        refuse(name, block, "a packed file knows Block, ResPostBlock, ParallelThingsBlock")


def _tokens(to: Lowering) -> Tokens:
    """Return the prefix tokens in timm's order, with their position embedding, and the patches' own."""
    model: Any = to.model
    distilled = isinstance(model, VisionTransformerDistilled)
    parts = [model.cls_token, model.dist_token if distilled else model.reg_token]
    tokens = [part for part in parts if part is not None]
    prefix = sum(part.shape[1] for part in tokens)
    covered = 0 if model.no_embed_class else prefix
    positions = model.pos_embed
    if positions is not None and positions.shape[1] != model.patch_embed.num_patches + covered:
        expected = model.patch_embed.num_patches + covered
        refuse("pos_embed", positions, f"it covers {positions.shape[1]} tokens of {expected}")

    def embedding() -> np.ndarray:
        if not model.dynamic_img_size:
            return wide(positions)[0]
        grid = [side // patch for side, patch in zip(to.image_size, model.patch_embed.patch_size, strict=True)]
        own = list(model.patch_embed.grid_size)
        return wide(resample_abs_pos_embed(positions, grid, own, num_prefix_tokens=covered))[0]

    def prefix_tokens() -> np.ndarray:
        values = np.concatenate([wide(part)[0] for part in tokens])
        if positions is not None:
            values[:covered] += embedding()[:covered]
        return values

    if prefix:
        to.store("prefix_tokens", prefix_tokens)
    if positions is not None:
        to.store("position_embedding", lambda: embedding()[covered:])
    return Tokens(prefix, positions is not None)


def _check_image_size(model: Any, image_size: tuple[int, int]) -> None:
    embed = model.patch_embed
    if model.dynamic_img_size:
        if any(side % patch for side, patch in zip(image_size, embed.patch_size, strict=True)):
            raise ConfigError(
                f"preprocessing.input_size {image_size} must be whole patches of {tuple(embed.patch_size)} pixels."
            )
    elif image_size != tuple(embed.img_size):
        raise ConfigError(
            f"preprocessing.input_size {image_size} is not the model's image size {tuple(embed.img_size)}."
        )


def float_model(program: Program) -> VisionTransformer:
    """Return timm's float model of a program, with random weights, in evaluation mode: what a peer of the engine runs.

    Raises:
        UnsupportedModelError: if timm cannot build it: its heads fill the embedding, its blocks are alike.
    """
    operations = program.operations
    norms = {operation.name: operation for operation in operations if isinstance(operation, Norm)}
    residuals = [operation for operation in operations if isinstance(operation, Residual)]
    attentions = [branch for branch in residuals[0].branches if isinstance(branch, Attention)]
    mlps = [branch for branch in residuals[1].branches if isinstance(branch, Mlp)]
    attention, mlp = attentions[0], mlps[0]
    embed, tokens, pool, classify = (
        next((operation for operation in operations if isinstance(operation, kind)), None)
        for kind in (Embed, Tokens, Pool, Classify)
    )
    assert isinstance(embed, Embed)
    assert isinstance(tokens, Tokens)
    assert isinstance(pool, Pool)
    width = embed.layer.outputs
    if attention.width != width:
        raise UnsupportedModelError(
            f"timm's vision transformer has no {attention.heads} heads of {attention.head_dim} channels at width "
            f"{width}."
        )
    block: Any = ResPostBlock if residuals[0].post else Block
    if len(attentions) > 1 or ".attns." in attention.name:
        block = functools.partial(ParallelThingsBlock, num_parallel=len(attentions))
    glu = mlp.kind in ("glu", "glu_gate_last")
    mlp_layer: Any = {"plain": timm.layers.Mlp, "swiglu": timm.layers.SwiGLU}.get(
        mlp.kind, functools.partial(timm.layers.GluMlp, gate_last=mlp.kind == "glu_gate_last")
    )
    registers_and_class = tokens.prefix - (pool.tokens - 1)
    class_token = pool.kind == "token" or tokens.prefix > 0
    torch.manual_seed(0)
    kind: Any = VisionTransformerDistilled if pool.tokens == 2 else VisionTransformer
    model: VisionTransformer = kind(
        img_size=program.input[1:],
        patch_size=embed.patch,
        in_chans=program.input[0],
        num_classes=classify.heads[0].outputs if isinstance(classify, Classify) else 0,
        global_pool=pool.kind,
        embed_dim=width,
        depth=len(residuals) // 2,
        num_heads=attention.heads,
        # timm rounds dim * mlp_ratio down, and a `glu` halves it.
        mlp_ratio=((2 if glu else 1) * mlp.hidden + 0.5) / width,
        qk_norm=attention.query_norm is not None,
        scale_attn_norm=attention.inner_norm is not None,
        scale_mlp_norm=mlp.inner_norm is not None,
        class_token=class_token,
        reg_tokens=registers_and_class - class_token,
        pos_embed="learn" if tokens.position else "none",
        pre_norm="norm_pre" in norms,
        final_norm="norm" in norms or "fc_norm" in norms,
        fc_norm="fc_norm" in norms,
        pool_include_prefix=pool.kind != "token" and pool.skip == 0,
        embed_norm_layer=_norm_layer(norms.get("patch_embed.norm")),
        norm_layer=_norm_layer(attention.norm),
        act_layer=mlp.activation,
        block_fn=block,
        mlp_layer=mlp_layer,
    )
    return model.eval()


def _norm_layer(norm: Norm | None) -> Any:
    if norm is None:
        return None
    return functools.partial({"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm.kind], eps=norm.eps)
