"""The families of models that qvit knows, one module each, and the gate that all of them go through."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import nn

from qvit.errors import PackedFileError, UnsupportedModelError
from qvit.format.program import Program
from qvit.models import beit, eva, relpos, swin, swinv2, swinv2_cr, vit
from qvit.models.lowering import Lowering, refuse
from qvit.nn.attention import QuantAttention
from qvit.nn.quantizer import Float32Module

FAMILIES: tuple[ModuleType, ...] = (vit, swin, swinv2, swinv2_cr, beit, relpos, eva)
"""Each has

- ``MODELS``: the classes of timm that it knows,
- ``ATTENTIONS``: the quantized class in place of each class of attention,
- ``ENDS``: names of the layers that keep 8 bits, as patterns,
- ``OWNERS``: classes of modules that own parameters of its kind alone, which stay in floating point,
- ``CONSTANT``: names of modules that see no image, whose values are constants of the file,
- ``blocks``: the blocks of a model in the order they run, what FSDP shards one by one,
- ``lower``: the operations of a model,
- ``float_model``, in some: timm's model of a program, whatever its name and sizes (:mod:`qvit.models.from_program`).
"""
ATTENTIONS: dict[type[nn.Module], type[QuantAttention]] = {
    kind: quantized for family in FAMILIES for kind, quantized in family.ATTENTIONS.items()
}
"""The quantized class in place of each class of attention, of all families."""
_IDLE = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices)
"""Modules that pass on their input in evaluation."""
_CONTAINERS = (nn.Sequential, nn.ModuleList)
"""Modules that compute what those inside do, of which each is looked at."""
MODELS: tuple[type[nn.Module], ...] = tuple(kind for family in FAMILIES for kind in family.MODELS)
"""The classes of timm that qvit knows."""


def lower(model: nn.Module, image_size: tuple[int, int]) -> tuple[Program, Lowering]:
    """Return the program of a quantized model for images of ``image_size``, and what makes its tensors.

    The model need not be calibrated for the program alone.

    Raises:
        UnsupportedModelError: naming the module that a packed file cannot represent.
        ConfigError: if the model does not take images of this size.
    """
    lowering = Lowering(model, image_size)
    operations = tuple(family_of(model).lower(lowering))
    _check_rest(lowering)
    patch: Any = lowering.module("patch_embed.proj")
    try:
        program = Program(_name_of(model), (patch.in_channels, *image_size), operations)
    except PackedFileError as error:
        raise UnsupportedModelError(f"Cannot quantize {_name_of(model)}: {error}") from error
    return program, lowering


def _check_rest(lowering: Lowering) -> None:
    """Refuse a module of which the program says nothing, unless all it may do in evaluation is to pass on its input.

    Raises:
        UnsupportedModelError: naming it.
    """
    constants = tuple(f"{part}." for part in family_of(lowering.model).CONSTANT)
    for name, module in lowering.model.named_modules():
        if isinstance(module, QuantAttention):
            constants += tuple(f"{name}.{part}." for part in module.CONSTANT)
        said = name in lowering.said or f"{name}.".startswith(constants) or isinstance(module, Float32Module)
        if name and not said and type(module) not in (*_IDLE, *_CONTAINERS):
            refuse(name, module, "it stands where timm computes nothing, and a packed file has no place for it")


def image_size_of(model: Any) -> tuple[int, int]:
    """Return height and width of the images that a model is made for; of one that takes any, those it was trained on.

    The model must be of a family.
    """
    size = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    return int(size[0]), int(size[1])


def family_of(model: nn.Module) -> ModuleType:
    """Return the family that knows the class of ``model``.

    Raises:
        UnsupportedModelError: if none does.
    """
    for family in FAMILIES:
        if type(model) in family.MODELS:
            return family
    known = ", ".join(kind.__name__ for kind in MODELS)
    raise UnsupportedModelError(f"Cannot quantize the model ({type(model).__name__}): qvit knows timm's {known}.")


def classifies(model: nn.Module) -> bool:
    """Return whether a model's outputs are logits of classes; of one class alone there is nothing to tell apart."""
    return int(getattr(model, "num_classes", 0)) > 1


def _name_of(model: nn.Module) -> str:
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return str(configuration.get("architecture") or type(model).__name__)
