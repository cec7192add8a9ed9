"""How near a quantized model is to the float model that it was made of, on images without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import DataError, TeacherMismatchError
from qvit.models.families import classifies, family_of
from qvit.nn.modes import evaluating
from qvit.nn.moments import Moments
from qvit.quantization.convert import check_values
from qvit.quantization.images import images_of


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Means over some images.

    Args:
        images: how many.
        same_class: percentage to which both models give the same class; ``None`` of feature extractors.
        cosine: mean cosine of the two outputs, logits or vectors.
        blocks: relative squared error of each block's output, by the block's name, in the order they run: the squared
            distance from the float model's output by the squared distance of that from its mean over images and tokens.
    """

    images: int
    same_class: float | None
    cosine: float
    blocks: dict[str, float]

    @property
    def sentence(self) -> str:
        """What the agreement is, for people."""
        if self.same_class is None:
            return f"mean cosine {self.cosine:.4f} with the float model's vectors"
        return f"same class as the float model for {self.same_class:.1f} %"


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, batches: Iterable[Any]) -> Agreement:
    """Return how near ``student`` is to ``teacher``, both on one device, in evaluation.

    Args:
        student: a quantized model.
        teacher: the float model that it was made of.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one.

    Raises:
        UnsupportedModelError: if a model is on the meta device.
        TeacherMismatchError: if the blocks or the outputs are others.
        DataError: if there are no images, or an output is NaN or infinite, naming the first block of which it is.
    """
    check_values(student)
    check_values(teacher)
    family, parameter = family_of(student), next(student.parameters())
    names = {module: name for name, module in student.named_modules()}
    if family is not family_of(teacher) or len(family.blocks(student)) != len(family.blocks(teacher)):
        raise TeacherMismatchError("The student was not made of this float model: it has other blocks.")
    pairs = list(zip(family.blocks(student), family.blocks(teacher), strict=True))
    labels = [names[block] for block, _ in pairs]
    errors = [torch.zeros((), dtype=torch.float64) for _ in pairs]
    sums = [Moments() for _ in pairs]
    images = same = 0
    cosines = 0.0
    with evaluating(student, teacher):
        for batch in batches:
            x = images_of(batch).to(parameter)
            wanted, floats = _with_outputs(teacher, [block for _, block in pairs], x)
            got, outputs = _with_outputs(student, [block for block, _ in pairs], x)
            if got.shape != wanted.shape:
                raise TeacherMismatchError(
                    f"The student gives {tuple(got.shape)} and the float model {tuple(wanted.shape)}: it was not made "
                    "of it."
                )
            for index, (output, target) in enumerate(zip(outputs, floats, strict=True)):
                errors[index] += (output.cpu().double() - target.cpu().double()).square().sum()
                sums[index].add(target)
            images += len(x)
            same += int((got.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
            cosines += float(torch.cosine_similarity(got.cpu().double(), wanted.cpu().double(), dim=-1).sum())
            _check_finite({**dict(zip(labels, outputs, strict=True)), "the quantized model": got})
            _check_finite({**dict(zip(labels, floats, strict=True)), "the float model": wanted})
    if not images:
        raise DataError("Agreement needs at least one image, and there was none.")
    tiny = torch.finfo(torch.float32).tiny
    return Agreement(
        images,
        100 * same / images if classifies(teacher) else None,
        cosines / images,
        {
            names[block]: float(error / (moments.count * moments.variance.sum()).clamp(min=tiny))
            for (block, _), error, moments in zip(pairs, errors, sums, strict=True)
        },
    )


def _check_finite(outputs: dict[str, Tensor]) -> None:
    for name, output in outputs.items():
        if not bool(torch.isfinite(output).all()):
            raise DataError(f"The output of {name} holds a NaN or an infinity: check the float model and the images.")


def _with_outputs(model: nn.Module, blocks: list[nn.Module], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return a model's output, and what each of some of its modules gives on the way."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        return model(images), outputs
    finally:
        for handle in handles:
            handle.remove()
