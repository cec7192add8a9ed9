"""Accuracy over all images of a loader, shared by the processes."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import nn

from qvit.data.loader import Batches, readable
from qvit.errors import CorruptImageError, TrainingStopped
from qvit.nn.modes import evaluating
from qvit.train.distributed import sum_over_processes
from qvit.train.preemption import Sigterm


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of images (0..100) whose class is the first, or among the first five, and of how many images."""

    top1: float
    top5: float
    images: int
    unreadable: int = 0
    seconds: float = 0.0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Batches,
    device: torch.device,
    *,
    skip_corrupt: bool = False,
    sigterm: Sigterm | None = None,
) -> Accuracy:
    """Return the accuracy of ``model`` over all images of ``loader``, those of the other processes included.

    Processes that share the images (:class:`qvit.data.order.EvaluationOrder`) count each of them once.

    Raises:
        CorruptImageError: naming the first image that cannot be read, unless ``skip_corrupt``; or if none can be read.
        TrainingStopped: in all processes, if ``sigterm`` was received in one.
    """
    first = fifth = images = unreadable = 0
    complaint = "There are none."
    start = time.perf_counter()
    with evaluating(model):
        for batch in readable(loader, skip_corrupt=skip_corrupt):
            if sigterm is not None and sigterm.received:
                break
            unreadable += len(batch.unreadable)
            complaint = batch.unreadable[0].message if batch.unreadable else complaint
            if len(batch.labels) == 0:
                continue
            logits = model(batch.images.to(device, non_blocking=True))
            ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == batch.labels.to(device)[:, None]
            first += int(ranked[:, 0].sum())
            fifth += int(ranked.any(dim=1).sum())
            images += len(batch.labels)
    counts = [first, fifth, images, unreadable, sigterm is not None and sigterm.received]
    first, fifth, images, unreadable, stopped = map(int, sum_over_processes(counts, device))
    if stopped:
        raise TrainingStopped("Stopped in the middle of an evaluation.")
    if not images:
        raise CorruptImageError(f"No validation image can be read, so there is no accuracy. {complaint}")
    percent = 100.0 / images
    return Accuracy(first * percent, fifth * percent, images, unreadable, time.perf_counter() - start)
