"""The door between the wings: a calibrated student becomes a packed file (:mod:`qvit.format.packed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvit._version import __version__
from qvit.errors import CheckpointError
from qvit.files import check_absent
from qvit.format.packed import PackedModel, write_packed
from qvit.models.checkpoint import load_checkpoint
from qvit.models.keeping import described
from qvit.models.lowering import refuse
from qvit.models.spec import ModelSpec
from qvit.nn.quantizer import has_quantizers
from qvit.quantization.convert import check_finished, check_known


def export(
    student: nn.Module,
    path: str | Path,
    *,
    preprocessing: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    origin: Mapping[str, Any] | None = None,
    replace: bool = False,
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
        replace: whether a file at ``path`` may be replaced, once the new one is complete.

    Raises:
        UnsupportedModelError: naming the module that a packed file cannot represent.
        UncalibratedError: naming the quantizer that has no scale.
        ConfigError: if preprocessing or classes do not fit the model, or something is at ``path``.
        PackedFileError: if the model holds a NaN, an infinity or a scale that float32 rounds to 0.
        OutputError: if the file cannot be written.
    """
    check_known(student, "export")
    if not has_quantizers(student):
        refuse("the model", student, "it has no quantizers: pass what qvit.quantize returned")
    check_finished(student)
    if not replace:
        check_absent(path, "replace=True")
    program, settings, names, lowering = described(student, preprocessing, classes)
    with torch.no_grad():
        tensors = lowering.tensors()
    write_packed(path, PackedModel(program, settings, names, dict(origin or {}), tensors))


def export_checkpoint(checkpoint: str | Path, path: str | Path) -> None:
    """Write the quantized model of a checkpoint as a packed file, with its preprocessing, classes and origin.

    Raises:
        CheckpointError: if the checkpoint cannot be read or holds a float model.
        QvitError: as :func:`export`.
    """
    check_absent(path)
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
