"""What the weights and settings of transformers' Swin, BEiT, DINOv2, CLIP and SigLIP towers are called in timm."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qvit.errors import UnsupportedModelError
from qvit.files import shown

Weights = dict[str, Tensor]
ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How one kind of model is read.

    Args:
        name: timm's general name of the architecture.
        defaults: what a configuration means where it says nothing.
        renames: patterns of weights and what stands in their place, one after the other; then q, k and v are joined.
        unused: pattern of weights that nothing here computes with.
        arguments: timm's arguments, of the configuration and the renamed weights, which it may change; and
            ``architecture``, where it is another than ``name``.
    """

    name: str
    defaults: Mapping[str, Any]
    renames: tuple[tuple[str, str], ...]
    unused: str
    arguments: Callable[[Mapping[str, Any], Weights], dict[str, Any]]

    def convert(self, config: Mapping[str, Any], stored: Weights) -> tuple[str, dict[str, Any], Weights]:
        """Return timm's name and arguments of a model, and its weights under timm's names.

        Raises:
            UnsupportedModelError: for what timm's model cannot represent.
        """
        config = {**self.defaults, **config, **(config.get("vision_config") or {})}
        weights: Weights = {}
        for name, value in stored.items():
            if re.match(self.unused, name):
                continue
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)
            weights[name] = value
        for name in [name for name in weights if ".attn.query." in name]:
            parts = [weights.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
            if parts[1] is None:  # BEiT's keys have no bias
                owner = name.removesuffix("query.bias")
                weights |= {f"{owner}{part}_bias": v for part, v in (("q", parts[0]), ("v", parts[2])) if v is not None}
            else:
                weights[name.replace("query", "qkv")] = torch.cat([part for part in parts if part is not None])
        arguments = self.arguments(config, weights)
        return arguments.pop("architecture", self.name), arguments, weights


_BERT = (  # names that several models have from BERT
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(?:attention|self)\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_TOWER = (  # names of the vision towers of CLIP and SigLIP
    (r"^vision_model\.", ""),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^classifier\.", "fc."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^fc\.", "head."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.q_proj\.", ".attn.query."),
    (r"\.self_attn\.k_proj\.", ".attn.key."),
    (r"\.self_attn\.v_proj\.", ".attn.value."),
)
_PLAIN = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
}


def _need_eps(config: Mapping[str, Any], eps: float) -> None:
    # Where the variance is near 1, 1e-6 and what is below it are lost in float32 alike.
    found = config["layer_norm_eps"]
    if found != eps and not (eps == 1e-6 and 0 < found < eps):
        raise UnsupportedModelError(f"it has layer_norm_eps {shown(found)}, timm's of this kind have {eps}.")


def activation(config: Mapping[str, Any]) -> str:
    """Return timm's name of a configuration's activation function.

    Raises:
        UnsupportedModelError: if qvit does not know it.
    """
    if config["hidden_act"] not in ACTIVATIONS:
        raise UnsupportedModelError(f"it has the activation {shown(config['hidden_act'])}, which qvit does not know.")
    return ACTIVATIONS[config["hidden_act"]]


def plain_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's arguments for what every configuration tells of sizes."""
    return {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["num_channels"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
    }


def _ratio(hidden: int, width: int) -> float:
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _swin(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    _need_eps(config, 1e-5)
    if activation(config) != "gelu":
        raise UnsupportedModelError(f"it has the activation {shown(config['hidden_act'])}, timm's Swin has gelu.")
    # The patches are merged at the end of a stage there, and at the beginning of the next one here.
    for name in [name for name in weights if ".downsample." in name]:
        number = re.sub(r"^layers\.(\d+)", lambda found: f"layers.{int(found[1]) + 1}", name)
        weights[f"moved.{number}"] = weights.pop(name)
    for name in [name for name in weights if name.startswith("moved.")]:
        weights[name.removeprefix("moved.")] = weights.pop(name)
    return {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["num_channels"],
        "embed_dim": config["embed_dim"],
        "depths": list(config["depths"]),
        "num_heads": list(config["num_heads"]),
        "window_size": config["window_size"],
        "mlp_ratio": config["mlp_ratio"],
        "qkv_bias": config["qkv_bias"],
    }


def _beit(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    _need_eps(config, 1e-6)
    if activation(config) != "gelu" or not config["use_mean_pooling"]:
        raise UnsupportedModelError("timm's BEiT has gelu, and takes the mean of the patches for its class.")
    return {
        **plain_arguments(config),
        "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"]),
        "init_values": config["layer_scale_init_value"] or None,
        "use_abs_pos_emb": config["use_absolute_position_embeddings"],
        "use_rel_pos_bias": config["use_relative_position_bias"],
        "use_shared_rel_pos_bias": config["use_shared_relative_position_bias"],
    }


def _dinov2(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    _need_eps(config, 1e-6)
    if "head.weight" in weights:
        raise UnsupportedModelError("A DINOv2 that classifies by class token and patches together is not supported.")
    arguments = {**plain_arguments(config), "init_values": 1e-5, "qkv_bias": config["qkv_bias"]}
    hidden = len(weights["blocks.0.mlp.fc1.bias"])
    arguments |= {"mlp_ratio": _ratio(hidden, config["hidden_size"]), "act_layer": activation(config)}
    if config["use_swiglu_ffn"]:
        arguments["architecture"] = "vit_giant_patch14_dinov2"
        del arguments["act_layer"]  # its own
    if "reg_token" in weights:  # timm adds the class token's position to the token itself
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
        arguments |= {"reg_tokens": weights["reg_token"].shape[1], "no_embed_class": True}
    return arguments


def _clip(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    _need_eps(config, 1e-5)
    weights["cls_token"] = weights["cls_token"].reshape(1, 1, -1)
    weights["pos_embed"] = weights["pos_embed"][None]
    arguments = {**plain_arguments(config), "act_layer": activation(config)}
    if "head.weight" in weights:  # a classifier sees the mean of the patches, each normalised by itself
        raise UnsupportedModelError("A classifier on CLIP's patches is not supported: give its vision tower.")
    return {**arguments, "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"])}


def _siglip(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    _need_eps(config, 1e-6)
    weights["pos_embed"] = weights["pos_embed"][None]
    arguments = {**plain_arguments(config), "act_layer": activation(config)}
    arguments["mlp_ratio"] = _ratio(config["intermediate_size"], config["hidden_size"])
    if "head.weight" in weights:  # a classifier sees the mean of the patches, not what the attention pools
        for name in [name for name in weights if name.startswith("attn_pool.")]:
            del weights[name]
        return {**arguments, "global_pool": "avg", "fc_norm": False}
    for part in ("weight", "bias"):
        joined = weights.pop(f"attn_pool.in_proj.{part}")
        width = len(joined) // 3
        weights[f"attn_pool.q.{part}"], weights[f"attn_pool.kv.{part}"] = joined.split([width, 2 * width])
    return arguments


_SIGLIP = Conversion(
    "vit_base_patch16_siglip_224",
    {**_PLAIN, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    _TOWER,
    r"(text_model\.|logit_|.*\.position_ids$)",
    _siglip,
)
_CLIP = Conversion(
    "vit_base_patch16_clip_224",
    {**_PLAIN, "layer_norm_eps": 1e-5, "patch_size": 32, "hidden_act": "quick_gelu"},
    _TOWER,
    r"(text_model\.|logit_scale|text_projection|visual_projection|.*\.position_ids$)",
    _clip,
)
DINOV2 = Conversion(
    "vit_base_patch14_dinov2",
    {**_PLAIN, "patch_size": 14, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False},
    (
        (r"^(dinov2|dinov2_with_registers)\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        *_BERT,
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"^classifier\.", "head."),
    ),
    r".*embeddings\.mask_token$",
    _dinov2,
)
CONVERSIONS: dict[str, Conversion] = {
    "swin": Conversion(
        "swin_tiny_patch4_window7_224",
        {
            **_PLAIN,
            "patch_size": 4,
            "embed_dim": 96,
            "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 7,
            "mlp_ratio": 4.0,
            "qkv_bias": True,
            "layer_norm_eps": 1e-5,
        },
        (
            (r"^swin\.", ""),
            (r"^embeddings\.norm\.", "patch_embed.norm."),
            (r"^encoder\.layers\.", "layers."),
            *_BERT,
            (r"^classifier\.", "head.fc."),
        ),
        r".*(relative_position_index|embeddings\.mask_token)$",
        _swin,
    ),
    "beit": Conversion(
        "beit_base_patch16_224",
        {
            **_PLAIN,
            "layer_norm_eps": 1e-12,
            "layer_scale_init_value": 0.1,
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": False,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False,
        },
        (
            (r"^beit\.", ""),
            (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
            (r"^encoder\.layer\.", "blocks."),
            (r"^pooler\.layernorm\.", "fc_norm."),
            *_BERT,
            (r"\.attn\.relative_position_bias\.", ".attn."),
            (r"\.lambda_([12])$", r".gamma_\1"),
            (r"^classifier\.", "head."),
        ),
        r".*(relative_position_index|embeddings\.mask_token)$",
        _beit,
    ),
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}
"""By the ``model_type`` of a configuration."""
