"""The door between the wings: a calibrated student becomes a packed file (:mod:`qvit.format.packed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvit._version import __version__
from qvit.errors import CheckpointError, ConfigError, PackedFileError, UncalibratedError
from qvit.format.header import check_classes, check_preprocessing
from qvit.format.packed import PackedModel, write_packed
from qvit.models.checkpoint import load_checkpoint
from qvit.models.families import lower
from qvit.models.lowering import refuse
from qvit.models.spec import ModelSpec, unnamed_classes
from qvit.nn.quantizer import Quantizer


def export(
    student: nn.Module,
    path: str | Path,
    *,
    preprocessing: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a quantized model as a packed file, which runs without PyTorch.

    The file holds the model as it is in evaluation, whatever mode ``student`` is in, for images of one size:
    ``preprocessing["input_size"]``. The position embedding of a model with ``dynamic_img_size`` is resampled to it.

    Args:
        student: what :func:`qvit.quantize` returned, calibrated or trained.
        path: file to write; ``.safetensors`` is the usual suffix.
        preprocessing: input_size (channels, height, width), mean, std, crop_pct, crop_mode and interpolation, as
            ``timm.data.resolve_model_data_config`` gives them.
        classes: class names in the order of the logits; by default ``LABEL_0``, ``LABEL_1``, ... of a classifier. A
            feature extractor has none.
        origin: how the model was made, for people; plain JSON data.

    Raises:
        UnsupportedModelError: naming the module that a packed file cannot represent.
        UncalibratedError: naming the quantizer that has no scale.
        ConfigError: if preprocessing or classes do not fit the model.
        PackedFileError: if the model holds a NaN, an infinity or a scale that float32 rounds to 0.
        OutputError: if the file cannot be written.
    """
    _check_quantized(student)
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in preprocessing.items()}
    size = settings.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(type(side) is int for side in size):
        raise ConfigError(f"preprocessing.input_size must be channels, height and width, not {size!r}.")
    program, lowering = lower(student, (size[1], size[2]))
    if classes is None:
        classes = unnamed_classes(program.output) if program.classifies else []
    try:
        check_classes(list(classes), program)
        check_preprocessing(settings, program.input)
    except PackedFileError as error:
        raise ConfigError(f"Cannot export {program.name}: {error}") from error
    with torch.no_grad():
        tensors = lowering.tensors()
    write_packed(path, PackedModel(program, settings, list(classes), dict(origin or {}), tensors))


def export_checkpoint(checkpoint: str | Path, path: str | Path) -> None:
    """Write the quantized model of a checkpoint as a packed file, with its preprocessing, classes and origin.

    Raises:
        CheckpointError: if the checkpoint cannot be read or holds a float model.
        QvitError: as :func:`export`.
    """
    model, spec = load_checkpoint(checkpoint)
    if spec.quant_config is None:
        raise CheckpointError(
            f"{checkpoint} holds a float model: quantize it first, qvit train {spec.name} --bits 4 --teacher "
            f"{checkpoint} ..."
        )
    export(model, path, preprocessing=spec.preprocessing, classes=spec.classes, origin=origin_of(spec))


def origin_of(spec: ModelSpec) -> dict[str, Any]:
    """Return how a model was made, as a packed file keeps it for people and for the Hub's model card."""
    return {
        "qvit": __version__,
        "method": spec.method,
        "metrics": spec.metrics,
        "quantization": spec.quant_config,
        "recipe": spec.recipe,
    }


def _check_quantized(student: nn.Module) -> None:
    quantizers = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer)}
    if not quantizers:
        refuse("the model", student, "it has no quantizers: pass what qvit.quantize returned")
    for name, quantizer in quantizers.items():
        if not quantizer.enabled:
            refuse(name, quantizer, "it is switched off, so that this part of the model is in floating point")
        if not quantizer.calibrated:
            raise UncalibratedError(f"{name} has no scale yet: call qvit.calibrate(model, batches) before exporting.")
