"""The families of models that qvit knows, one module each, and the gate that all of them go through."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from qvit.errors import PackedFileError, UnsupportedModelError
from qvit.format.program import Program
from qvit.models import beit, eva, relpos, swin, swinv2, swinv2_cr, vit
from qvit.models.lowering import Lowering
from qvit.nn.attention import QuantAttention

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
    patch: Any = lowering.module("patch_embed.proj")
    try:
        program = Program(_name_of(model), (patch.in_channels, *image_size), operations)
    except PackedFileError as error:
        raise UnsupportedModelError(f"Cannot quantize {_name_of(model)}: {error}") from error
    return program, lowering


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
