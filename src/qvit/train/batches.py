"""Batches of a run's images: to start from, to train with, to evaluate on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from qvit.data.loader import Batches, make_loader, make_transform, readable
from qvit.data.order import ALONE, EvaluationOrder, Rank, TrainOrder
from qvit.data.resident import ResidentImages, ResidentLoader
from qvit.data.sources import ImageSets
from qvit.models.spec import ModelSpec
from qvit.train.options import Options, make_accelerator, rank_of


def training_images(data: ImageSets, spec: ModelSpec, count: int, options: Options) -> list[Tensor]:
    """Return ``count`` training images in batches, prepared as for evaluation.

    Every process gets the same.
    """
    batch_size = min(count, 128)
    loader = training_batches(data.train, spec, batch_size, options)
    batches = itertools.islice(readable(loader, skip_corrupt=options.skip_corrupt), -(-count // batch_size))
    return [batch.images for batch in batches if len(batch.labels)]


def training_batches(
    images: Dataset[Any],
    spec: ModelSpec,
    batch_size: int,
    options: Options,
    augmentation: Mapping[str, Any] | None = None,
    *,
    repeats: int = 0,
    accumulate: int = 1,
    rank: Rank = ALONE,
) -> Batches:
    """Return batches of images in the order of the seed, prepared for a model and perhaps augmented.

    Args:
        images: of :class:`ImageSets`.
        spec: whose preprocessing is used.
        batch_size: images per optimizer step, over all processes.
        options: seed, workers and device.
        augmentation: of the recipe; ``None`` to prepare the images as for evaluation.
        repeats: see :func:`make_loader`.
        accumulate: see :func:`make_loader`.
        rank: see :func:`make_loader`.

    Raises:
        ConfigError: if a batch cannot be divided evenly, or images in memory cannot be augmented so.
    """
    device = make_accelerator(options).device
    ordering: dict[str, Any] = {"repeats": repeats, "accumulate": accumulate, "rank": rank}
    if isinstance(images, ResidentImages):
        order = TrainOrder(len(images), batch_size, options.seed, **ordering)
        return ResidentLoader(images, order, spec.preprocessing, augmentation, device)
    return make_loader(
        images,
        make_transform(spec.preprocessing, augmentation),
        batch_size,
        shuffle=True,
        workers=options.workers,
        device=device,
        seed=options.seed,
        **ordering,
    )


def validation_batches(data: ImageSets, spec: ModelSpec, batch_size: int, options: Options) -> Batches:
    """Return this process's validation images in batches, in the same order every time.

    Args:
        data: of which the validation images are taken.
        spec: whose preprocessing is used.
        batch_size: images at once, over all processes.
        options: workers and device.
    """
    accelerator = make_accelerator(options)
    size, rank = -(-batch_size // accelerator.num_processes), rank_of(accelerator)
    if isinstance(data.val, ResidentImages):
        order = EvaluationOrder(len(data.val), size, rank)
        return ResidentLoader(data.val, order, spec.preprocessing, None, accelerator.device)
    return make_loader(
        data.val,
        make_transform(spec.preprocessing),
        size,
        shuffle=False,
        workers=options.workers,
        device=accelerator.device,
        rank=rank,
    )
