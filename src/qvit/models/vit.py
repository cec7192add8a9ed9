"""timm's ``VisionTransformer`` and its distilled variant: what a packed file says of them, and what it cannot."""

from __future__ import annotations

from typing import Any, NoReturn

import timm.layers
import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import nn

from qvit.errors import ConfigError, UnsupportedModelError
from qvit.format.architecture import Architecture, Norm
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantLinear
from qvit.nn.rectify import HeadRectifier, TokenRectifier

_BLOCKS: dict[type, str] = {Block: "pre", ResPostBlock: "post", ParallelThingsBlock: "parallel"}


_NORMS: dict[type, str] = {
    nn.LayerNorm: "layer",
    timm.layers.LayerNorm: "layer",
    timm.layers.LayerNormFp32: "layer",
    nn.RMSNorm: "rms",
    timm.layers.RmsNorm: "rms",
    timm.layers.RmsNormFp32: "rms",
}


_MLPS: dict[type, str] = {timm.layers.Mlp: "plain", timm.layers.GluMlp: "glu", timm.layers.SwiGLU: "swiglu"}


_ACTIVATIONS: dict[type, str] = {
    timm.layers.activations.GELU: "gelu",
    timm.layers.activations.GELUTanh: "gelu_tanh",
    timm.layers.activations.QuickGELU: "quick_gelu",
    timm.layers.activations.Swish: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


_POOLS = ("token", "avg", "avgmax", "max")


def refuse(name: str, module: object, why: str) -> NoReturn:
    """Raise the error that names a module which a packed file cannot represent."""
    raise UnsupportedModelError(f"Cannot export {name} ({type(module).__name__}): {why}.")


def architecture_of(model: VisionTransformer, image_size: tuple[int, int]) -> Architecture:
    """Return the architecture of ``model`` for images of ``image_size``, or refuse what it cannot say."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        refuse("patch_embed", embed, "only timm's plain PatchEmbed is supported")
    proj = embed.proj
    plain = (proj.stride, proj.padding, proj.dilation, proj.groups) == (proj.kernel_size, (0, 0), (1, 1), 1)
    if not plain or proj.kernel_size != tuple(embed.patch_size):
        refuse("patch_embed.proj", proj, "its patches overlap or are padded")
    _check_image_size(model, image_size)
    if model.attn_pool is not None or model.global_pool not in _POOLS:
        refuse("the model", model, f"it pools by {model.global_pool!r}; a packed file knows {', '.join(_POOLS)}")
    for name in ("head", "head_dist"):
        if not isinstance(getattr(model, name, model.head), QuantLinear):
            refuse(name, getattr(model, name), "a packed file holds a classifier")
    if not len(model.blocks):
        refuse("blocks", model.blocks, "it is empty")

    distilled = isinstance(model, VisionTransformerDistilled)  # which looks at neither registers nor fc_norm
    registers = 0 if distilled or model.reg_token is None else model.reg_token.shape[1]
    prefix = int(model.cls_token is not None) + distilled + registers
    position = "none" if model.pos_embed is None else "patches" if model.no_embed_class else "all"
    if model.pos_embed is not None:
        covered = embed.num_patches + (prefix if position == "all" else 0)
        if model.pos_embed.shape[1] != covered:
            refuse("pos_embed", model.pos_embed, f"it covers {model.pos_embed.shape[1]} tokens of {covered}")
    blocks = {name: _describe_block(f"blocks.{name}", block) for name, block in model.blocks.named_children()}
    first = blocks["0"]
    for name, block in blocks.items():
        for key, value in block.items():
            if value != first[key]:
                at, module = f"blocks.{name}", model.blocks[int(name)]
                refuse(at, module, f"its {key} is {value}, that of blocks.0 is {first[key]}: all must be alike")
    return Architecture(
        name=_model_name(model),
        image_size=image_size,
        patch_size=(int(embed.patch_size[0]), int(embed.patch_size[1])),
        channels=proj.in_channels,
        embed_dim=proj.out_channels,
        depth=len(blocks),
        class_token=model.cls_token is not None,
        distillation_token=distilled,
        register_tokens=registers,
        position_embedding=position,
        embed_norm=_norm("patch_embed.norm", embed.norm),
        pre_norm=_norm("norm_pre", model.norm_pre),
        final_norm=_norm("norm", model.norm),
        pool_norm=None if distilled else _norm("fc_norm", model.fc_norm),
        pool=model.global_pool,
        pool_skip=0 if model.global_pool == "token" or model.pool_include_prefix else prefix,
        class_count=model.head.out_features,
        **first,
    )


def _check_image_size(model: VisionTransformer, image_size: tuple[int, int]) -> None:
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


def _model_name(model: VisionTransformer) -> str:
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return str(configuration.get("architecture") or type(model).__name__)


def _describe_block(name: str, block: nn.Module) -> dict[str, Any]:
    if type(block) not in _BLOCKS:
        refuse(name, block, f"a packed file knows {', '.join(kind.__name__ for kind in _BLOCKS)}")
    paths: list[tuple[str, Any, Any, Any]]
    if isinstance(block, ParallelThingsBlock):
        attentions: Any = enumerate(block.attns)
        mlps: Any = enumerate(block.ffns)
        paths = [(f"{name}.attns.{j}", path.norm, path.attn, None) for j, path in attentions]
        paths += [(f"{name}.ffns.{j}", path.norm, None, path.mlp) for j, path in mlps]
    else:
        paths = [(name, block.norm1, block.attn, block.mlp), (name, block.norm2, None, None)]
    described: dict[str, Any] = {
        "block": _BLOCKS[type(block)],
        "parallel": max(1, len(paths) // 2) if isinstance(block, ParallelThingsBlock) else 1,
    }
    for path, norm, attention, mlp in paths:
        found = {"norm": _norm(f"{path}.norm", norm)}
        if found["norm"] is None:
            refuse(f"{path}.norm", norm, "a block needs its norms")
        if attention is not None:
            found |= _describe_attention(f"{path}.attn", attention)
        if mlp is not None:
            found |= _describe_mlp(f"{path}.mlp", mlp)
        for key, value in found.items():
            if described.setdefault(key, value) != value:
                refuse(path, block, f"its {key} is {value} and {described[key]}: all must be alike")
    return described


def _describe_attention(name: str, attention: Any) -> dict[str, Any]:
    if type(attention) is not QuantAttention:
        refuse(name, attention, "it is no attention of qvit's")
    query, key = attention.query_rectifier, attention.key_rectifier
    kinds = {HeadRectifier: "head", TokenRectifier: "token", nn.Identity: None}
    if type(query) not in kinds or type(key) is not type(query):
        refuse(f"{name}.query_rectifier", query, "it is no rectifier of qvit's, or another than the keys'")
    q_norm, k_norm = _norm(f"{name}.q_norm", attention.q_norm), _norm(f"{name}.k_norm", attention.k_norm)
    if q_norm != k_norm:
        refuse(f"{name}.k_norm", attention.k_norm, "it is another norm than that of the queries")
    return {
        "num_heads": attention.num_heads,
        "head_dim": attention.head_dim,
        "attention_scale": float(attention.scale),
        "rectify": kinds[type(query)],
        "qk_norm": q_norm,
        "attention_norm": _norm(f"{name}.norm", attention.norm),
    }


def _describe_mlp(name: str, mlp: Any) -> dict[str, Any]:
    if type(mlp) not in _MLPS:
        refuse(name, mlp, f"a packed file knows {', '.join(kind.__name__ for kind in _MLPS)}")
    for layer, module in mlp.named_children():
        if layer.startswith("fc") and not isinstance(module, QuantLinear):
            refuse(f"{name}.{layer}", module, "it is no quantized linear layer")
    activation = _ACTIVATIONS.get(type(mlp.act))
    if isinstance(mlp.act, nn.GELU):
        activation = {"none": "gelu", "tanh": "gelu_tanh"}[mlp.act.approximate]
    if activation is None:
        known = ", ".join(sorted(set(_ACTIVATIONS.values())))
        refuse(f"{name}.act", mlp.act, f"a packed file knows the activations {known}")
    return {
        "mlp": _MLPS[type(mlp)],
        "mlp_hidden": mlp.fc2.in_features,
        "gate_last": bool(getattr(mlp, "gate_last", False)),
        "activation": activation,
        "mlp_norm": _norm(f"{name}.norm", mlp.norm),
    }


def _norm(name: str, module: nn.Module) -> Norm | None:
    if isinstance(module, nn.Identity):
        return None
    kind = _NORMS.get(type(module))
    if kind is None:
        refuse(name, module, "it is no LayerNorm and no RMSNorm")
    eps = getattr(module, "eps", None)
    return Norm(kind, float(torch.finfo(torch.float32).eps if eps is None else eps))
