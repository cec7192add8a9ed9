"""timm's float model of a program: what other runtimes run in a comparison with a packed file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import timm
import torch
from torch import nn

from qvit.errors import QvitError, UnsupportedModelError
from qvit.files import first_line
from qvit.format.branches import Attention, AttentionPool
from qvit.format.program import Program, first_difference
from qvit.models import swin, swinv2, vit
from qvit.models.families import lower
from qvit.quantization.convert import quantize

Build = Callable[[Program], nn.Module]


def float_model(program: Program) -> nn.Module:
    """Return timm's float model that computes what a program does, with random weights, in evaluation mode.

    Each candidate is lowered, without memory for its weights, and its program compared with what is asked for.

    Raises:
        UnsupportedModelError: if timm cannot build it, or what it builds computes something else, saying where.
    """
    reason = ""
    for build in _builders(program):
        with torch.device("meta"):
            model = build(program)
        reason = _difference(model, program)
        if not reason:
            return build(program)
    raise UnsupportedModelError(f"timm has no float model for this {program.name}: {reason}.")


def _builders(program: Program) -> Iterator[Build]:
    """Yield what may build the model: by its operations, whatever its name and sizes, or else by its name."""
    attentions = [attention for attention, _ in program.attentions().values() if isinstance(attention, Attention)]
    if any(attention.window for attention in attentions):
        yield (swinv2 if attentions[0].scale is None else swin).float_model
    elif not any(attention.bias or attention.rotary for attention in attentions) and all(
        not isinstance(operation, AttentionPool) for operation in program.operations
    ):
        yield vit.float_model
    yield _model_called


def _model_called(program: Program) -> nn.Module:
    """Return timm's model of the program's name."""
    try:
        channels, *size = program.input
        classes = program.output if program.classifies else 0
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(program.name, img_size=size, in_chans=channels, num_classes=classes)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(f"timm cannot build {program.name}: {first_line(error)}") from error
    return model.eval()


def _difference(model: nn.Module, program: Program) -> str:
    """Return in what a float model differs from the program, or nothing."""
    try:
        built, _ = lower(quantize(model), program.input[1:])
    except QvitError as error:
        return f"timm's is none that qvit knows ({str(error).removesuffix('.')})"
    place = first_difference(program.computation(), built.computation())
    return f"timm's differs from {place}" if place else ""
