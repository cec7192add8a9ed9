"""Checkpoints: a model with all that is needed to build, run and go on training it, in one file.

Read with ``weights_only=True``: tensors and plain data, no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn

from qvit.config import QuantConfig
from qvit.errors import CheckpointError, ConfigError, NewerCheckpointError, UnsupportedModelError
from qvit.files import shown, write_atomically
from qvit.kinds import kind_of
from qvit.models.reading import read_file
from qvit.models.spec import ModelSpec, instantiate, shape_of
from qvit.models.weights import fitting
from qvit.nn.quantizer import BITS
from qvit.quantization.convert import layers_with_bits, quantize

FORMAT, VERSION = "qvit-checkpoint", 3
"""Version 2 records the bits of every quantizer among the weights, version 3 has two entries under other names."""


def build(spec: ModelSpec, weights: Mapping[str, Any], source: str) -> VisionTransformer:
    """Return the model of a spec with ``weights``, in evaluation mode.

    Memory is taken for the model once the weights are known to fit.

    Raises:
        CheckpointError: naming ``source`` and the first weight that does not fit.
        ConfigError: as :func:`qvit.models.spec.create_model`.
    """
    fit = _fitting(spec, weights, source)
    model = quantized_by(instantiate(spec), spec)
    model.load_state_dict(fit)
    return model.eval()


def _fitting(spec: ModelSpec, weights: Mapping[str, Any], source: str) -> dict[str, Any]:
    return fitting(weights, quantized_by(shape_of(spec), spec), f"{source} does not fit {spec.name}")


def quantized_by(model: VisionTransformer, spec: ModelSpec) -> VisionTransformer:
    """Return the float model of a spec as the spec says that it is quantized, if it is.

    Raises:
        ConfigError: for bits that cannot be meant.
        UnsupportedModelError: as :func:`qvit.quantize`.
    """
    if spec.quant_config is None:
        return model
    config = QuantConfig.from_dict(spec.quant_config)
    # What matches nothing is refused where a model is made. Here it changes nothing, and older files have it.
    idle = config.unmatched(layers_with_bits(model))
    overrides = {pattern: bits for pattern, bits in config.overrides.items() if pattern not in idle}
    return quantize(model, dataclasses.replace(config, overrides=overrides))


def write_checkpoint(
    path: Path,
    spec: ModelSpec,
    model: nn.Module | Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint, replacing ``path`` only once the new file is complete on disk.

    Args:
        path: file to write.
        spec: what the model is.
        model: its weights are taken; or they themselves.
        training: optimizer, progress and the like, for going on; plain data and tensors.
        previous: where to keep what was at ``path`` before; ``None`` to replace it.

    Raises:
        OutputError: if it cannot be written; what was at ``path`` is still there.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "spec": dataclasses.asdict(spec),
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


def is_checkpoint(content: Any) -> bool:
    """Return whether what a file holds is a checkpoint of qvit's, damaged or not."""
    return isinstance(content, dict) and isinstance(content.get("format"), str) and content["format"] == FORMAT


def read_checkpoint(path: str | Path) -> tuple[ModelSpec, dict[str, Any], dict[str, Any] | None]:
    """Return spec, weights and training state of a checkpoint.

    The spec is checked; the weights are by :func:`build`, and the training state by whoever goes on from it.

    Raises:
        CheckpointError: if the file is absent, damaged, edited, no checkpoint of qvit's, or (NewerCheckpointError) of
            a newer version.
    """
    return parts_of(read_file(path), path)


def parts_of(content: Any, path: str | Path) -> tuple[ModelSpec, dict[str, Any], dict[str, Any] | None]:
    """Return spec, weights and training state of what :func:`qvit.models.reading.read_file` found at ``path``.

    Raises:
        CheckpointError: as :func:`read_checkpoint`.
    """
    if not is_checkpoint(content):
        kind = kind_of(path) if isinstance(content, dict) else None
        text = "not a checkpoint of qvit's" if kind is None else kind.text
        raise CheckpointError(f"{path} is {text}.")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise NewerCheckpointError(
            f"{path} has checkpoint version {shown(version)}, this qvit reads up to {VERSION}: update qvit."
        )
    broken = f"{path} was edited or damaged"
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{broken}: its version must be a whole number from 1 up, not {shown(version)}.")
    try:
        spec = ModelSpec.read(content.get("spec") if version >= 3 else _renamed(content.get("card")))
    except ConfigError as error:
        raise CheckpointError(f"{broken}: {error}") from error
    weights, training = content.get("weights"), content.get("training")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{broken}: its weights must be tensors by name, they are {shown(weights)}.")
    if training is not None and not isinstance(training, dict):
        raise CheckpointError(f"{broken}: what only training needs is {shown(training)}.")
    return spec, weights, training


def _renamed(card: Any) -> Any:
    """Return the spec of a checkpoint of version 1 or 2, which called it a card, and the rectifier ``rectify``."""
    config = card.get("quant_config") if isinstance(card, dict) else None
    if not isinstance(config, dict) or "rectify" not in config:
        return card
    entries = {"rectifier" if name == "rectify" else name: value for name, value in config.items()}
    return {**card, "quant_config": entries}


def load_checkpoint(path: str | Path) -> tuple[VisionTransformer, ModelSpec]:
    """Return the model of a checkpoint, in evaluation mode, and its spec.

    Raises:
        CheckpointError: as :func:`read_checkpoint` and :func:`build`.
    """
    spec, weights, _ = read_checkpoint(path)
    return rebuilt(spec, weights, path), spec


def rebuilt(spec: ModelSpec, weights: Mapping[str, Any], path: str | Path) -> VisionTransformer:
    """Return the model of the checkpoint at ``path``, in evaluation mode.

    Raises:
        CheckpointError: as :func:`build`, also for a spec that describes no model.
    """
    with _of_a_model(path):
        return build(spec, weights, str(path))


def check_weights(spec: ModelSpec, weights: Mapping[str, Any], path: str | Path) -> None:
    """Refuse weights of the checkpoint at ``path`` from which :func:`rebuilt` would make no model; takes no memory.

    Raises:
        CheckpointError: as :func:`rebuilt`.
    """
    with _of_a_model(path):
        _fitting(spec, weights, str(path))


@contextlib.contextmanager
def _of_a_model(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, UnsupportedModelError) as error:
        raise CheckpointError(f"{path} was edited or damaged: {error}") from error
