"""Float models to distil from or to start from, wherever they are: a file, a folder, timm, the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import timm.data
from timm.models import VisionTransformer

from qvit.errors import ConfigError, HubError, UnsupportedModelError
from qvit.files import first_line
from qvit.models.checkpoint import ModelCard, describe, load_float_model, same_architecture
from qvit.models.families import family_of
from qvit.models.fetch import CHECKPOINT, PREFIX, fetch
from qvit.models.transformers_vit import class_names, is_transformers_config, load_transformers, read_json

_FILES = ["config.json", "preprocessor_config.json", "model.safetensors", CHECKPOINT]


def load_float(
    source: str | Path, expected: ModelCard, *, quantized: bool = False
) -> tuple[VisionTransformer, ModelCard]:
    """Return a float model and its card, wherever it is.

    Args:
        source: ``hf-hub:OWNER/NAME`` (``@REVISION`` may follow) or a folder with the same files: a timm model, a
            transformers ViT or DeiT, or a float checkpoint of qvit's; the name of a timm model that has pretrained
            weights; or a file, as :func:`qvit.models.checkpoint.load_float_model` takes it.
        expected: the model and the classes that the user works with.
        quantized: whether a file may also be a checkpoint of a quantized model.

    Raises:
        HubError: if the Hub or timm cannot hand it out.
        CheckpointError: if it is absent, damaged or quantized.
        UnsupportedModelError: if it is no vision transformer, or one that cannot be represented.
    """
    source = str(source)
    if source.startswith(PREFIX):
        return _from_folder(fetch(source.removeprefix(PREFIX), _FILES), source, expected)
    if Path(source).is_dir():
        return _from_folder(Path(source), source, expected)
    if not Path(source).exists() and timm.is_model(source.partition(".")[0]):
        if not timm.is_model_pretrained(source):
            raise ConfigError(f"timm has no pretrained weights for {source}: give a checkpoint.")
        return _from_timm(source, source.partition(".")[0], {}, source, expected)
    return load_float_model(source, expected, quantized=quantized)


def _from_folder(folder: Path, source: str, expected: ModelCard) -> tuple[VisionTransformer, ModelCard]:
    if (folder / CHECKPOINT).exists():
        return load_float_model(folder / CHECKPOINT, expected)
    config = read_json(folder / "config.json", source)
    if is_transformers_config(config):
        return load_transformers(folder, source, expected)
    if isinstance(config.get("architecture"), str):
        return _from_timm(
            f"local-dir:{folder}", config["architecture"], config.get("model_args") or {}, source, expected
        )
    kind = config.get("model_type", "unknown")
    raise UnsupportedModelError(
        f"{source} holds a model of type {kind!r}: qvit reads timm models, ViT, DeiT, Swin, BEiT, DINOv2, CLIP, SigLIP."
    )


def _from_timm(
    address: str, name: str, arguments: dict[str, Any], source: str, expected: ModelCard
) -> tuple[VisionTransformer, ModelCard]:
    """Let timm build a model with its pretrained weights; with ``expected``'s arguments if it is called the same."""
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    if name == expected.name and not arguments:
        arguments = dict(expected.model_args)
    try:
        model: Any = timm.create_model(address, pretrained=True, **arguments)
    except Exception as error:  # timm's download and every check of the weights in it
        raise HubError(f"timm cannot load {source} with its weights: {first_line(error)}") from error
    family_of(model)
    card = describe(name, arguments, _timm_classes(model, expected), timm.data.resolve_model_data_config(model))
    if same_architecture(card, expected):
        card.name, card.model_args = expected.name, dict(expected.model_args)
    return model.eval(), card


def _timm_classes(model: VisionTransformer, expected: ModelCard) -> list[str]:
    settings: Any = model.pretrained_cfg
    names = settings.get("label_names")
    subset = timm.data.infer_imagenet_subset(model)
    if not names and subset:
        names = timm.data.ImageNetInfo(subset).label_names()
    unnamed = {"id2label": {str(i): f"LABEL_{i}" for i in range(int(model.num_classes))}}
    return [str(name) for name in names] if names else class_names(unnamed, expected.classes)
