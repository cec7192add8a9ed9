"""Hugging Face transformers' vision models as timm models: names, fused projections, settings.

Only the folder that ``save_pretrained`` writes is read, by its names: transformers itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import VisionTransformer
from torch import Tensor

from qvit.errors import CheckpointError, ConfigError, QvitError, UnsupportedModelError
from qvit.files import shown
from qvit.format.fields import is_whole
from qvit.models.arguments import MAX_CHANNELS
from qvit.models.checkpoint import build
from qvit.models.reading import find_weights, read_file, read_json
from qvit.models.spec import ModelSpec, describe, same_architecture, unnamed_classes
from qvit.models.transformers_families import CONVERSIONS, DINOV2, Conversion, Weights, activation, plain_arguments
from qvit.models.transformers_images import preprocessing_in

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


def load_transformers(
    folder: Path, source: str, expected: ModelSpec | None, report: Callable[[str], None]
) -> tuple[VisionTransformer, ModelSpec]:
    """Return the timm model with the weights and the settings of a transformers vision model.

    ViT and DeiT classifiers, Swin, BEiT, DINOv2, and the vision towers of CLIP and SigLIP. What has no classifier is a
    feature extractor.

    Args:
        folder: with ``config.json``, the weights as ``save_pretrained`` writes them and, if there is one,
            ``preprocessor_config.json`` or ``processor_config.json``.
        source: where it comes from, for messages.
        expected: the model and the classes that the user works with, if they are known.
        report: told what was changed for the images.

    Raises:
        CheckpointError: if a file is absent or damaged, or weights do not fit the configuration.
        UnsupportedModelError: for what timm's vision transformer cannot represent.
    """
    config = read_json(folder / "config.json", source)
    stored = _stored(folder, source)
    try:
        conversion = CONVERSIONS.get(str(config.get("model_type")))
        if conversion is None:
            name, arguments, weights = _vit({**_DEFAULTS, **config}, _weights(stored))
        else:
            name, arguments, weights = conversion.convert(config, stored)
        said = preprocessing_in(folder, source, arguments["in_chans"])
        if remark := _follow_processor(conversion, arguments, weights, said):
            report(f"{source}: {remark}")
        if conversion is None:
            half = [0.5] * arguments["in_chans"]
            said = {"mean": half, "std": half, **said}
        head = weights.get("head.weight", weights.get("head.fc.weight"))
        unnamed = dict(enumerate(unnamed_classes(0 if head is None else len(head))))
        classes = (
            [] if head is None else class_names({"id2label": unnamed, **config}, expected.classes if expected else [])
        )
        spec = describe(name, arguments, classes, said)
        if expected is not None and same_architecture(spec, expected):
            spec.preprocessing = {**expected.preprocessing, **said}
        return build(spec, weights, source), spec
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source} cannot be used: {error}") from error
    except QvitError as error:
        raise CheckpointError(f"{source} does not hold what its config.json says: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{source} does not hold what its config.json says: {error} is absent.") from error
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} has weights and a config.json that do not fit together.") from error


def _follow_processor(
    conversion: Conversion | None, arguments: dict[str, Any], weights: Weights, said: dict[str, Any]
) -> str:
    """Make a DINOv2 for images of the size that its processor gives, as transformers does, and say so.

    Raises:
        UnsupportedModelError: if a model of another family is given images that it does not take.
    """
    made = list(to_2tuple(arguments["img_size"]))
    given = said.pop("input_size", [0, *made])[1:]
    if given == made:
        return ""
    before, after = (" x ".join(map(str, size)) for size in (made, given))
    if conversion is not DINOV2:
        raise UnsupportedModelError(
            f"its preprocessor makes images of {after} pixels and the model takes {before}: write the model's size "
            "into preprocessor_config.json."
        )
    prefix = 0 if arguments.get("no_embed_class") else 1
    grids = [[side // arguments["patch_size"] for side in size] for size in (made, given)]
    patches = weights["pos_embed"][:, prefix:].unflatten(1, grids[0]).permute(0, 3, 1, 2)
    # Antialiased where there are registers, as transformers has it of either.
    resampled = F.interpolate(patches, size=grids[1], mode="bicubic", antialias="reg_tokens" in arguments)
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :prefix], resampled.flatten(2).mT], dim=1)
    arguments["img_size"] = given
    return f"the position embedding was resampled from images of {before} pixels to the {after} of its preprocessor."


def class_names(config: Mapping[str, Any], expected: list[str]) -> list[str]:
    """Return the classes of a transformers configuration in the order of the logits.

    ImageNet's are returned as the WordNet numbers that its folders are called by. A model that does not name its
    classes is taken to have ``expected``, if there are as many.

    Raises:
        ConfigError: if ``id2label`` is not names by number.
    """
    labels = config.get("id2label") or {}
    if not isinstance(labels, dict) or not all(re.fullmatch(r"\d{1,9}", str(number)) for number in labels):
        raise ConfigError(f"id2label must be names by number, not {shown(labels)}.")
    names = [str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    if len(names) == 1000 and names == imagenet.label_descriptions():
        return list(imagenet.label_names())
    if len(names) == len(expected) and all(_UNNAMED.match(name) for name in names):
        return list(expected)
    return names


def _stored(folder: Path, source: str) -> dict[str, Tensor]:
    stored = read_file(find_weights(folder, source))
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise CheckpointError(f"{source} has a file of weights that holds other things than tensors by name.")
    return {str(name): value.float() if value.is_floating_point() else value for name, value in stored.items()}


def _weights(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if _UNUSED.match(name):
            continue
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        weights[name] = value
    for name in [name for name in weights if ".attn.query." in name]:
        parts = [weights.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        present = [part for part in parts if part is not None]
        weights[name.replace("query", "qkv")] = torch.cat(present)
    return weights


def _vit(config: Mapping[str, Any], weights: Weights) -> tuple[str, dict[str, Any], Weights]:
    """Return timm's general name and explicit arguments of a ViT or DeiT, and its weights."""
    if "head.weight" not in weights:
        raise UnsupportedModelError("it has no classifier: give a ViT or DeiT for image classification.")
    eps = config["layer_norm_eps"]
    if not 0 < eps <= _LARGEST_EPS:
        raise UnsupportedModelError(f"it has layer_norm_eps {eps}, timm's vision transformers have {_LARGEST_EPS}.")
    if not is_whole(config["num_channels"], 1, MAX_CHANNELS):
        raise ConfigError(f"num_channels is {shown(config['num_channels'])}.")
    arguments = {
        **plain_arguments(config),
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "qkv_bias": config["qkv_bias"],
    }
    if activation(config) != "gelu":  # timm's default
        arguments["act_layer"] = activation(config)
    name = "deit_base_distilled_patch16_224" if "head_dist.weight" in weights else "vit_base_patch16_224"
    if "embeddings.distillation_token" in weights:
        token = weights.pop("embeddings.distillation_token")
        if "head_dist.weight" in weights:
            weights["dist_token"] = token
        else:  # a token beside the class token that no head reads
            weights["reg_token"] = token
            arguments["reg_tokens"] = 1
    return name, arguments, weights
