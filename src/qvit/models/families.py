"""The families of models that qvit knows, one module each, and the gate that all of them go through."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from qvit.errors import PackedFileError, UnsupportedModelError
from qvit.format.program import Program
from qvit.models import vit
from qvit.models.lowering import Lowering

FAMILIES: tuple[ModuleType, ...] = (vit,)
"""Each has ``MODELS``, the classes of timm that it knows, and ``lower``, which yields their operations."""


def lower(model: nn.Module, image_size: tuple[int, int]) -> tuple[Program, Lowering]:
    """Return the program of a quantized model for images of ``image_size``, and what makes its tensors.

    The model need not be calibrated for the program alone.

    Raises:
        UnsupportedModelError: naming the module that a packed file cannot represent.
        ConfigError: if the model does not take images of this size.
    """
    lowering = Lowering(model, image_size)
    operations = tuple(_family_of(model).lower(lowering))
    patch: Any = lowering.module("patch_embed.proj")
    try:
        program = Program(_name_of(model), (patch.in_channels, *image_size), operations)
    except PackedFileError as error:
        raise UnsupportedModelError(f"Cannot export {_name_of(model)}: {error}") from error
    return program, lowering


def _family_of(model: nn.Module) -> ModuleType:
    for family in FAMILIES:
        if type(model) in family.MODELS:
            return family
    known = ", ".join(kind.__name__ for family in FAMILIES for kind in family.MODELS)
    raise UnsupportedModelError(
        f"Cannot export the model ({type(model).__name__}): a packed file holds timm's {known}."
    )


def _name_of(model: nn.Module) -> str:
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return str(configuration.get("architecture") or type(model).__name__)


def float_model(program: Program) -> nn.Module:
    """Return timm's float model that computes what a program does, with random weights, in evaluation mode.

    Raises:
        UnsupportedModelError: if timm cannot build it.
    """
    model: nn.Module = vit.float_model(program)
    return model
