"""Checkpoints: a model with all that is needed to build, run and go on training it, in one file.

Read with ``weights_only=True``: tensors and plain data, no code.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import timm.data
import torch
from timm.models import VisionTransformer
from torch import nn

from qvit.config import QuantConfig
from qvit.errors import CheckpointError, ConfigError, QvitError, UnsupportedModelError
from qvit.files import first_line, write_atomically
from qvit.images import Mode
from qvit.models.families import family_of
from qvit.models.queries import attention_layers
from qvit.nn.quantizer import BITS, Quantizer
from qvit.quantization.convert import layers_with_bits, quantize

FORMAT, VERSION = "qvit-checkpoint", 2
"""Version 2 records the bits of every quantizer among the weights; version 1 is read as well."""


@dataclasses.dataclass
class ModelCard:
    """What a model is, beside its weights: enough to build it again and to feed it.

    Args:
        name: timm's name of the architecture.
        model_args: arguments of ``timm.create_model`` beside the name and the number of classes.
        classes: class names in the order of the logits.
        preprocessing: input_size, mean, std, crop_pct, crop_mode, interpolation.
        quant_config: of a quantized model, :meth:`QuantConfig.to_dict`; ``None`` of a float one.
        method: how it was made, for people.
        metrics: measured on the validation images, for people.
        recipe: it was trained with, :meth:`qvit.train.recipe.Recipe.to_dict`, for people.
    """

    name: str
    model_args: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]
    quant_config: dict[str, Any] | None = None
    method: str = "full-precision"
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """The image mode that the model takes: grey for one input channel."""
        return "L" if self.preprocessing["input_size"][0] == 1 else "RGB"


def create_model(card: ModelCard) -> VisionTransformer:
    """Return the float model of a card with fresh weights.

    Raises:
        ConfigError: for a name or arguments that timm does not know, or a model that is no vision transformer.
    """
    if card.name not in timm.list_models():
        near = difflib.get_close_matches(card.name, timm.list_models(["vit_*", "deit*", "swin*"]), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('vit_*') lists them."
        raise ConfigError(f"timm has no model called {card.name!r}: {hint}")
    try:
        model: Any = timm.create_model(card.name, num_classes=len(card.classes), **card.model_args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"timm cannot build {card.name} with {card.model_args}: {first_line(error)}") from error
    try:
        family_of(model)
    except UnsupportedModelError as error:
        raise ConfigError(f"{card.name} is no model for qvit. {error}") from error
    return model


def describe(
    name: str, model_args: Mapping[str, Any], classes: list[str], preprocessing: Mapping[str, Any]
) -> ModelCard:
    """Return the card of a new float model: timm's own preprocessing for it with ``preprocessing`` over it.

    Raises:
        ConfigError: as :func:`create_model`.
    """
    card = ModelCard(name, dict(model_args), classes, {})
    model = create_model(card)
    card.preprocessing = _plain({**timm.data.resolve_model_data_config(model), **preprocessing})
    channels, size = model.in_chans, model.patch_embed.img_size
    card.preprocessing["input_size"] = [channels, *(size or card.preprocessing["input_size"][1:])]
    for statistic in ("mean", "std"):
        if len(card.preprocessing[statistic]) != channels:
            raise ConfigError(
                f"{name} takes {channels} channels and preprocessing.{statistic} has "
                f"{len(card.preprocessing[statistic])}: give one value a channel."
            )
    return card


def same_architecture(one: ModelCard, other: ModelCard) -> bool:
    """Return whether two cards are of the same computation, however their names and arguments say it.

    Raises:
        ConfigError: as :func:`create_model`.
    """
    models = [create_model(card) for card in (one, other)]
    first, second = (
        (
            type(model),
            {name: tuple(value.shape) for name, value in model.state_dict().items()},
            [layer.num_heads for layer in attention_layers(model)],
            type(next(module.act for module in model.modules() if hasattr(module, "act"))),
            model.global_pool,
        )
        for model in models
    )
    return first == second


def build(card: ModelCard, weights: Mapping[str, Any], source: str) -> VisionTransformer:
    """Return the model of a card with ``weights``, in evaluation mode.

    Raises:
        CheckpointError: naming ``source`` and the first weight that does not fit.
        ConfigError: as :func:`create_model`.
    """
    model = create_model(card)
    if card.quant_config is not None:
        config = QuantConfig.from_dict(card.quant_config)
        # What matches nothing is refused where a model is made. Here it changes nothing, and older files have it.
        idle = config.unmatched(layers_with_bits(model))
        overrides = {pattern: bits for pattern, bits in config.overrides.items() if pattern not in idle}
        model = quantize(model, dataclasses.replace(config, overrides=overrides))
    _load_weights(model, weights, f"{source} does not fit {card.name}")
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not module.calibrated:
            raise CheckpointError(f"{source} has no usable scale for {name}: it is damaged or was never calibrated.")
    return model.eval()


def _load_weights(model: nn.Module, weights: Mapping[str, Any], complaint: str) -> None:
    expected = model.state_dict()
    for name, value in expected.items():
        if name.endswith(f".{BITS}") and name not in weights:
            continue  # version 1
        if not isinstance(weights.get(name), torch.Tensor):
            raise CheckpointError(f"{complaint}: {name} is absent.")
        if weights[name].shape != value.shape:
            has, needs = tuple(weights[name].shape), tuple(value.shape)
            raise CheckpointError(f"{complaint}: {name} has shape {has}, the model needs {needs}.")
    extra = set(weights) - set(expected)
    if extra:
        raise CheckpointError(f"{complaint}: the model has no {min(extra)}.")
    model.load_state_dict(weights)


def save_checkpoint(
    path: Path,
    card: ModelCard,
    model: nn.Module | Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint, replacing ``path`` only once the new file is complete on disk.

    Args:
        path: file to write.
        card: what the model is.
        model: its weights are taken; or they themselves.
        training: optimizer, progress and the like, for going on; plain data and tensors.
        previous: where to keep what was at ``path`` before; ``None`` to replace it.

    Raises:
        OutputError: if it cannot be written; what was at ``path`` is still there.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "card": dataclasses.asdict(card),
        "weights": model.state_dict() if isinstance(model, nn.Module) else dict(model),
        "training": dict(training) if training is not None else None,
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary), previous)


def weights_checksum(model: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers of a model, in hexadecimal: names, shapes and values, in order.

    The record of a quantizer's bits is no weight and not among them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.endswith(f".{BITS}"):
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> tuple[ModelCard, dict[str, Any], dict[str, Any] | None]:
    """Return card, weights and training state of a checkpoint.

    Raises:
        CheckpointError: if the file is absent, damaged, no checkpoint of qvit's, or of a newer version.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of qvit's.")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is edited or damaged: its version is no whole number from 1 up.")
    if version > VERSION:
        raise CheckpointError(f"{path} has checkpoint version {version}, this qvit reads up to {VERSION}: update qvit.")
    try:
        return ModelCard(**content["card"]), dict(content["weights"]), content["training"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def load_checkpoint(path: str | Path) -> tuple[VisionTransformer, ModelCard]:
    """Return the model of a checkpoint, in evaluation mode, and its card.

    Raises:
        CheckpointError: as :func:`read_checkpoint` and :func:`build`.
    """
    card, weights, _ = read_checkpoint(path)
    try:
        return build(card, weights, str(path)), card
    except CheckpointError:
        raise
    except (QvitError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def load_float_model(
    path: str | Path, expected: ModelCard, *, quantized: bool = False
) -> tuple[VisionTransformer, ModelCard]:
    """Return a float model and its card: from a qvit checkpoint, or from a plain state dict of ``expected``'s model.

    Args:
        path: a checkpoint of ``qvit train --full-precision``, or a ``.pth``/``.safetensors`` file of timm weights.
        expected: card by which a plain state dict is read.
        quantized: whether a checkpoint of a quantized model will do as well.

    Raises:
        CheckpointError: if it is neither, or a quantized model that will not do.
    """
    content = _read(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        model, card = load_checkpoint(path)
        if card.quant_config is not None and not quantized:
            raise CheckpointError(f"{path} holds a quantized model; a teacher must be a float one.")
        return model, card
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no weights: expected a qvit checkpoint or a state dict.")
    weights = {name.removeprefix("module."): value for name, value in content.items()}
    return build(expected, weights, str(path)), expected


def _read(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in the zip reader, the unpickler or the tensor reader
        raise CheckpointError(f"{path} cannot be read, it is damaged or no checkpoint: {first_line(error)}") from error


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
