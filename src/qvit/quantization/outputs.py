"""What a reconstruction compares, outputs of two models, and what it shows them: views of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvit.errors import DataError, TeacherMismatchError
from qvit.quantization.images import images_of

_SHIFT = 1 / 8
"""Largest shift of a picture in a view, as a fraction of its sides."""


def output_distance(student: Tensor, teacher: Tensor, *, classes: bool) -> Tensor:
    """Return the mean distance of two outputs ``(B, C)``, a scalar.

    For logits the Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats; for the
    vectors of a feature extractor the squared distance by the variance of the teacher's vectors about their mean.

    Raises:
        TeacherMismatchError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise TeacherMismatchError(
            f"The student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: the teacher must be the "
            "float model that the student was made of."
        )
    student, teacher = student.float(), teacher.float()
    if classes:
        log_probabilities = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
        return F.kl_div(*log_probabilities, log_target=True, reduction="batchmean")
    spread = (teacher - teacher.mean(dim=0)).square().mean() if len(teacher) > 1 else teacher.square().mean()
    return F.mse_loss(student, teacher) / spread.clamp(min=torch.finfo(spread.dtype).tiny)


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return views of ``images (B, C, H, W)``: each mirrored or not, all shifted, half of them mixed with another one.

    Nothing here has to keep what a label says, for the teacher is asked about the view itself.
    """
    count, (height, width) = len(images), images.shape[-2:]
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    pads = [min(round(side * _SHIFT), side - 1) for side in (height, width)]
    top, left = (int(torch.randint(2 * pad + 1, (), generator=generator)) for pad in pads)
    padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]), mode="reflect")
    images = padded[..., top : top + height, left : left + width]
    weights = 0.5 * torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    return torch.lerp(images, images.flip(0), weights[:, None, None, None])


def joined(batches: Iterable[Any]) -> Tensor:
    """Return all images as one tensor on the CPU."""
    images = [images_of(batch) for batch in batches]
    for batch in images:
        if batch.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"Images must be of one size, not {tuple(images[0].shape[1:])} and {tuple(batch.shape[1:])}."
            )
    if not sum(map(len, images)):
        raise DataError("Reconstruction needs at least one image, and there was none.")
    return torch.cat([batch.float().cpu() for batch in images])
