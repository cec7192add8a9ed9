"""What is said of a model that is kept in a file, a packed one or a checkpoint: read from the model, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from timm.models import get_model_args
from torch import nn

from qvit.errors import ConfigError, PackedFileError, UnsupportedModelError
from qvit.files import check_absent
from qvit.format.header import check_classes, check_preprocessing
from qvit.format.program import Program, first_difference
from qvit.models.arguments import check_arguments
from qvit.models.checkpoint import quantized_by, write_checkpoint
from qvit.models.families import lower
from qvit.models.lowering import Lowering
from qvit.models.spec import ModelSpec, shape_of, unnamed_classes
from qvit.models.weights import fitting
from qvit.nn.quantizer import has_quantizers
from qvit.quantization.convert import check_finished, check_known, quantize


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    preprocessing: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    replace: bool = False,
) -> None:
    """Write a model as a checkpoint, the file that ``qvit train`` writes; :func:`qvit.load_checkpoint` reads it.

    All commands that take a checkpoint take it: ``qvit eval``, ``analyze``, ``compare``, ``export``, ``train
    --initial-model`` and, of a float model, ``--teacher``. It holds no optimizer: ``--resume`` cannot go on with it. Of
    several processes one should write it.

    Args:
        model: what :func:`qvit.quantize` returned, calibrated or trained, or a float model that it takes. How it is
            built is not asked for: timm notes the arguments of ``timm.create_model`` in the model.
        path: file to write; ``.pt`` is the usual suffix.
        preprocessing: as of :func:`qvit.export`.
        classes: likewise.
        replace: whether a file at ``path`` may be replaced, once the new one is complete.

    Raises:
        UnsupportedModelError: for a model that is in a wrapper (DDP, ``torch.compile``, Lightning), that qvit does not
            know, or that was changed after ``timm.create_model`` made it.
        UncalibratedError: naming the quantizer that has no scale.
        ConfigError: if preprocessing or classes do not fit the model, no checkpoint can hold an argument of its
            ``timm.create_model``, or something is at ``path``.
        CheckpointError: naming a weight that is NaN or infinite.
        OutputError: if the file cannot be written.
    """
    check_known(model, "save")
    check_finished(model)
    if not replace:
        check_absent(path, "replace=True")
    program, settings, names, _ = described(_student(model), preprocessing, classes)
    spec = _spec_of(model, settings, names)
    shape = quantized_by(shape_of(spec), spec)
    made, _ = lower(_student(shape), program.input[1:])
    if place := first_difference(program.to_list(), made.to_list()):
        arguments = "".join(f", {name}={value!r}" for name, value in spec.model_args.items())
        raise UnsupportedModelError(
            f"Cannot save the model ({type(model).__name__}): from {place}, it is not what "
            f"timm.create_model({spec.name!r}{arguments}) makes; make it with arguments, or keep its state_dict()."
        )
    weights = fitting(model.state_dict(), shape, f"Cannot save {spec.name}")
    write_checkpoint(Path(path), spec, {name: value.cpu() for name, value in weights.items()})


def described(
    student: nn.Module, preprocessing: Mapping[str, Any], classes: Sequence[str] | None
) -> tuple[Program, dict[str, Any], list[str], Lowering]:
    """Return a student's program, preprocessing and classes as a file holds them, and what makes its tensors.

    Args:
        student: of a family; calibrated if its tensors are wanted.
        preprocessing: as of :func:`qvit.export`.
        classes: likewise.

    Raises:
        UnsupportedModelError: naming the module that a packed file cannot represent.
        ConfigError: if preprocessing or classes do not fit the model.
    """
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in preprocessing.items()}
    size = settings.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(type(side) is int for side in size):
        raise ConfigError(f"preprocessing.input_size must be channels, height and width, not {size!r}.")
    program, lowering = lower(student, (size[1], size[2]))
    if isinstance(classes, (str, bytes, Mapping, Set)):
        raise ConfigError(
            f"classes must be a list of names in the order of the logits, not a {type(classes).__name__}."
        )
    if classes is None:
        classes = unnamed_classes(program.output) if program.classifies else []
    names = list(classes)
    try:
        check_classes(names, program)
        check_preprocessing(settings, program.input)
    except PackedFileError as error:
        raise ConfigError(str(error)) from error
    return program, settings, names, lowering


def _student(model: nn.Module) -> nn.Module:
    return model if has_quantizers(model) else quantize(model)


def _spec_of(model: Any, preprocessing: dict[str, Any], classes: list[str]) -> ModelSpec:
    """Return what a model is; a checkpoint's reader would accept it."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise UnsupportedModelError(
            f"Cannot save the model ({type(model).__name__}): nothing tells how it was built; timm.create_model notes "
            "that in what it makes."
        )
    # Rates of dropout are not among the second.
    arguments = {**getattr(model, "_model_args", {}), **get_model_args(model)}
    del arguments["num_classes"]  # the names of the classes tell it
    try:
        check_arguments(arguments)
    except ConfigError as error:
        raise ConfigError(f"No checkpoint can hold how timm.create_model made this {name}: {error}") from error
    config = getattr(model, "quant_config", None)
    spec = ModelSpec(
        name,
        {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()},
        classes,
        preprocessing,
    )
    if config is not None:
        spec.quant_config, spec.method = config.to_dict(), "made from Python"
    return ModelSpec.read(dataclasses.asdict(spec))
