"""What is measured at every step: in this process part by part, and summed over the processes once per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qvit.train.distributed import sum_over_processes


class Part(NamedTuple):
    """A part of a batch: its images and labels, how many could not be read, and means over it."""

    images: Tensor
    labels: Tensor
    unreadable: int
    means: dict[str, float]


class Totals(NamedTuple):
    """A whole batch: sums over its images, how many they are, and whether any process wants to stop or to save."""

    sums: dict[str, float]
    images: int
    unreadable: int
    stop: bool
    save: bool


def means(loss: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Return ``train_loss``, the scalars among ``parts`` and ``train_top1`` (percent), fetched from the device at once.

    Args:
        loss: scalar.
        parts: ``logits (B, classes)``, and whatever else the loss is made of.
        labels: ``(B,)``.
    """
    scalars = {"train_loss": loss, **{name: part for name, part in parts.items() if part.ndim == 0}}
    scalars["train_top1"] = 100 * (parts["logits"].argmax(dim=-1) == labels).float().mean()
    values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def together(parts: Sequence[Part], device: torch.device, *, stop: bool, save: bool) -> Totals:
    """Add up the parts of a batch and those of the other processes; all processes must call it."""
    names = list(parts[0].means)
    counts = [sum(len(part.labels) for part in parts), sum(part.unreadable for part in parts), stop, save]
    sums = [sum(part.means[name] * len(part.labels) for part in parts) for name in names]
    images, unreadable, any_stop, any_save, *sums = sum_over_processes([*counts, *sums], device)
    return Totals(dict(zip(names, sums, strict=True)), int(images), int(unreadable), any_stop > 0, any_save > 0)
