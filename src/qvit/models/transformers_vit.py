"""Hugging Face transformers' vision models as timm models: names, fused projections, settings.

Only the folder that ``save_pretrained`` writes is read, by its names: transformers itself is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.data
import torch
from timm.models import VisionTransformer
from torch import Tensor

from qvit.errors import CheckpointError, QvitError, UnsupportedModelError
from qvit.files import first_line
from qvit.models.checkpoint import ModelCard, build, describe, same_architecture
from qvit.models.transformers_families import ACTIVATIONS, CONVERSIONS

# What a transformers configuration means where it says nothing.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_LARGEST_EPS = 1e-6
"""timm's LayerNorm adds 1e-6 to a variance. The published checkpoints were trained so, though transformers adds 1e-12
to them; where the variance is near 1 either is lost in float32."""
_RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(vit|deit)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
]
_UNUSED = re.compile(r"^(vit|deit)\.(pooler\.|embeddings\.mask_token$)")  # of no use to a classifier
_UNNAMED = re.compile(r"^LABEL_\d+$")


def is_transformers_config(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is of a model that :func:`load_transformers` takes."""
    return config.get("model_type") in ("vit", "deit", *CONVERSIONS)


def load_transformers(folder: Path, source: str, expected: ModelCard) -> tuple[VisionTransformer, ModelCard]:
    """Return the timm model with the weights and the settings of a transformers vision model.

    ViT and DeiT classifiers, Swin, BEiT, DINOv2, and the vision towers of CLIP and SigLIP. What has no classifier is a
    feature extractor.

    It has ``expected``'s name and arguments if that is the same architecture, so that a student can start from it.

    Args:
        folder: with ``config.json``, ``model.safetensors`` and, if there is one, ``preprocessor_config.json``.
        source: where it comes from, for messages.
        expected: the model and the classes that the user works with.

    Raises:
        CheckpointError: if a file is absent or damaged, or weights do not fit the configuration.
        UnsupportedModelError: for what timm's vision transformer cannot represent.
    """
    config = read_json(folder / "config.json", source)
    theirs = _stored(folder / "model.safetensors", source)
    conversion = CONVERSIONS.get(config.get("model_type", ""))
    if conversion is None:
        config, weights = {**_DEFAULTS, **config}, _weights(theirs)
        classes = class_names(config, expected.classes)
        card = _card(config, weights, classes, source)
    else:
        try:
            name, arguments, weights = conversion.convert(config, theirs)
        except KeyError as error:
            raise CheckpointError(f"{source} does not hold what its config.json says: {error} is absent.") from error
        classifies = any(name.startswith("head.") for name in weights)
        classes = class_names(config, expected.classes) if classifies else []
        card = describe(name, arguments, classes, {})
    if same_architecture(card, expected):
        card = ModelCard(expected.name, dict(expected.model_args), classes, dict(expected.preprocessing))
    card.preprocessing |= _preprocessing(folder / "preprocessor_config.json", source)
    if "embeddings.distillation_token" in weights:
        token = "dist_token" if "head_dist.weight" in weights else "reg_token"
        weights[token] = weights.pop("embeddings.distillation_token")
    try:
        return build(card, weights, source), card
    except QvitError as error:
        raise CheckpointError(f"{source} does not hold what its config.json says: {error}") from error


def class_names(config: Mapping[str, Any], ours: list[str]) -> list[str]:
    """Return the classes of a transformers configuration in the order of the logits.

    ImageNet's are returned as the WordNet numbers that its folders are called by. A model that does not name its
    classes is taken to have ``ours``, if there are as many.
    """
    labels = config.get("id2label") or {}
    names = [str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    if len(names) == 1000 and names == imagenet.label_descriptions():
        return list(imagenet.label_names())
    if len(names) == len(ours) and all(_UNNAMED.match(name) for name in names):
        return list(ours)
    return names


def read_json(path: Path, source: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: if it is absent or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} has no usable {path.name}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} has no usable {path.name}: it holds no JSON object.")
    return content


def _stored(path: Path, source: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # absent, cut short, or no safetensors file
        raise CheckpointError(f"{source} has no usable {path.name}: {first_line(error)}") from error


def _weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if _UNUSED.match(name):
            continue
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        weights[name] = value.float()
    for name in [name for name in weights if ".attn.query." in name]:
        parts = [weights.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        present = [part for part in parts if part is not None]
        weights[name.replace("query", "qkv")] = torch.cat(present)
    return weights


def _card(config: Mapping[str, Any], weights: Mapping[str, Tensor], classes: list[str], source: str) -> ModelCard:
    """Return a card of the architecture by timm's general name and explicit arguments."""
    if "head.weight" not in weights:
        raise UnsupportedModelError(f"{source} has no classifier: give a ViT or DeiT for image classification.")
    if config["hidden_act"] not in ACTIVATIONS:
        raise UnsupportedModelError(f"{source} has the activation {config['hidden_act']!r}, which qvit does not know.")
    if not 0 < config["layer_norm_eps"] <= _LARGEST_EPS:
        raise UnsupportedModelError(
            f"{source} has layer_norm_eps {config['layer_norm_eps']}, timm's vision transformers have {_LARGEST_EPS}."
        )
    arguments = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["num_channels"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "qkv_bias": config["qkv_bias"],
    }
    if config["hidden_act"] != "gelu":  # timm's default
        arguments["act_layer"] = ACTIVATIONS[config["hidden_act"]]
    name = "vit_base_patch16_224"
    if "head_dist.weight" in weights:
        name = "deit_base_distilled_patch16_224"
    elif "embeddings.distillation_token" in weights:
        arguments["reg_tokens"] = 1  # a token beside the class token that no head reads
    channels = config["num_channels"]
    return describe(name, arguments, classes, {"mean": [0.5] * channels, "std": [0.5] * channels})


def _preprocessing(path: Path, source: str) -> dict[str, Any]:
    """Return what a ``preprocessor_config.json`` says of mean, std and resizing; nothing if there is none."""
    if not path.exists():
        return {}
    config = read_json(path, source)
    found: dict[str, Any] = {}
    if config.get("do_normalize", True) and {"image_mean", "image_std"} <= set(config):
        found = {"mean": list(config["image_mean"]), "std": list(config["image_std"])}
    if config.get("do_center_crop") and "crop_size" in config:
        size, crop = (_side(config[name]) for name in ("size", "crop_size"))
        found |= {"crop_pct": crop / size, "crop_mode": "center"}
    else:
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    names = {2: "bilinear", 3: "bicubic"}
    if config.get("resample") in names:
        found["interpolation"] = names[config["resample"]]
    return found


def _side(size: Any) -> int:
    return int(next(iter(size.values())) if isinstance(size, dict) else size)
