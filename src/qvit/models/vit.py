"""timm's ``VisionTransformer`` and its distilled variant: ViT, DeiT, AugReg, CLIP, SigLIP, DINOv2, AIMv2, ...."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import nn

from qvit.errors import UnsupportedModelError
from qvit.format.branches import Attention, Mlp, Residual
from qvit.format.ops import Classify, Embed, Norm, Operation, Pool, Tokens
from qvit.format.program import Program
from qvit.models import parts
from qvit.models.attention import attention
from qvit.models.lowering import Lowering, refuse
from qvit.nn.attention import QuantAttention, QuantSelfAttention
from qvit.nn.pool import QuantAttentionPool

MODELS: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {
    timm.layers.Attention: QuantSelfAttention,
    timm.layers.AttentionPoolLatent: QuantAttentionPool,
}
ENDS = parts.ENDS
OWNERS: tuple[type[nn.Module], ...] = ()
CONSTANT: tuple[str, ...] = ()
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
    distilled = isinstance(model, VisionTransformerDistilled)
    prefix = [model.cls_token, model.dist_token if distilled else model.reg_token]
    count = sum(part.shape[1] for part in prefix if part is not None)
    yield parts.tokens(to, prefix, model.pos_embed, 0 if model.no_embed_class else count)
    yield from parts.norm(to, "norm_pre")
    for name, _ in model.blocks.named_children():
        yield from _block(to, f"blocks.{name}")
    yield from parts.norm(to, "norm")
    # A distilled model looks at neither fc_norm nor its registers.
    skip = 0 if model.global_pool == "token" or model.pool_include_prefix else count
    if model.attn_pool is not None:
        if skip:
            refuse("attn_pool", model.attn_pool, "a packed file cannot leave out the tokens before the patches")
        yield from parts.pool_by_attention(to, "attn_pool")
    else:
        yield Pool(model.global_pool, tokens=1 + distilled, skip=skip)
    if distilled:
        to.module("fc_norm")
        if isinstance(model.head, nn.Identity):
            refuse("head", model.head, "without classifiers timm gives the mean of two tokens, and a packed file both")
    else:
        yield from parts.norm(to, "fc_norm")
    yield from parts.classify(to, *(("head", "head_dist") if distilled else ("head",)))


def _block(to: Lowering, name: str) -> Iterator[Residual]:
    block = to.known(name, Block, ResPostBlock, ParallelThingsBlock)
    if type(block) is ParallelThingsBlock:
        attentions = [f"{name}.attns.{index}" for index in range(len(block.attns))]
        mlps = [f"{name}.ffns.{index}" for index in range(len(block.ffns))]
        yield Residual(tuple(attention(to, f"{path}.attn", f"{path}.norm", f"{path}.ls") for path in attentions))
        yield Residual(tuple(to.mlp(f"{path}.mlp", f"{path}.norm", f"{path}.ls") for path in mlps))
    else:
        post = type(block) is ResPostBlock
        scales = (None, None) if post else (f"{name}.ls1", f"{name}.ls2")
        parts.need_norms(block, name)
        yield Residual((attention(to, f"{name}.attn", f"{name}.norm1", scales[0]),), post)
        yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm2", scales[1]),), post)


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
