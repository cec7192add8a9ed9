"""Batches of a data set: transforms, order and worker processes."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qvit.config import check_count
from qvit.data.datasets import Unreadable
from qvit.data.order import ALONE, EvaluationOrder, Rank, Sample, TrainOrder
from qvit.data.posterize import allow_no_bits
from qvit.data.randomness import seeded
from qvit.errors import CorruptImageError, DataError
from qvit.files import first_line
from qvit.images import Picture
from qvit.runtime.preprocess import LARGEST, fit, preprocess

Transform = Callable[[Picture], Tensor]
_Prepared = tuple[Tensor | None, int, int, list[Unreadable]]


class Batch(NamedTuple):
    """``images (B, C, H, W)`` float32, ``labels (B,)`` int64, what could not be read, and the images' numbers."""

    images: Tensor
    labels: Tensor
    unreadable: list[Unreadable]
    numbers: list[int]


class Batches(Protocol):
    """What training and evaluation walk through: a :class:`DataLoader`, or a loader of images in memory."""

    @property
    def batch_sampler(self) -> Any:
        """The :class:`TrainOrder` or :class:`EvaluationOrder` of the batches."""

    def __len__(self) -> int:
        """Return how many batches there are."""

    def __iter__(self) -> Iterator[Batch]:
        """Walk through them."""


def make_transform(
    preprocessing: Mapping[str, Any], augmentation: Mapping[str, Any] | None = None, *, normalize: bool = True
) -> Transform:
    """Return the engine's evaluation transform, or timm's training transform if an ``augmentation`` is given.

    Args:
        preprocessing: input_size, mean, std, crop_pct, crop_mode and interpolation, as a checkpoint holds them.
        augmentation: arguments of :func:`timm.data.create_transform`.
        normalize: for evaluation, return float32 by mean and std; else the uint8 before that.
    """
    if augmentation is None:
        return functools.partial(_evaluation, preprocess if normalize else fit, preprocessing)
    kept = {name: preprocessing[name] for name in ("input_size", "mean", "std")}
    transform = allow_no_bits(timm.data.create_transform(**{**kept, **augmentation}, is_training=True))
    return functools.partial(_training, transform, LARGEST // math.prod(preprocessing["input_size"][1:]))


def _evaluation(function: Callable[..., NDArray[Any]], preprocessing: Mapping[str, Any], picture: Picture) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(function(picture, preprocessing)))


def _training(transform: Callable[[Image.Image], Tensor], longest: int, picture: Picture) -> Tensor:
    """Augment a picture; of a strip more than ``longest`` times as long as wide, its middle.

    Some of timm's transforms resize the whole image until its shorter edge is the model's input.
    """
    width, height = (
        min(edge, longest * min(picture.width, picture.height)) for edge in (picture.width, picture.height)
    )
    if (width, height) == (picture.width, picture.height):
        return transform(picture.whole())
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return transform(picture.crop((left, top, left + width, top + height)).convert(picture.mode))


class Prepared(Dataset[Any]):
    """Images by a transform, each with randomness of its own, so that it does not matter which process draws it.

    Args:
        images: gives (image, label) pairs or :class:`Unreadable`.
        transform: from :func:`make_transform`.
        substitute: whether the next readable image stands in for an unreadable one, so that batches stay whole.
    """

    def __init__(self, images: Dataset[Any], transform: Transform, *, substitute: bool) -> None:
        self.images, self.transform, self.substitute = images, transform, substitute

    def __getitem__(self, sample: Sample) -> _Prepared:
        """Return the transformed image or ``None``, its label and number, and what could not be read in its place."""
        unreadable: list[Unreadable] = []
        tries = len(self.images) if self.substitute else 1  # type: ignore[arg-type]
        for attempt in range(tries):
            number = (sample.image + attempt) % len(self.images)  # type: ignore[arg-type]
            item = self.images[number]
            if not isinstance(item, Unreadable):
                with seeded(sample.seed):
                    return self.transform(item[0]), int(item[1]), number, unreadable
            unreadable = unreadable or [item]
        return None, -1, -1, unreadable


def make_loader(
    dataset: Dataset[Any],
    transform: Transform,
    batch_size: int,
    *,
    shuffle: bool,
    workers: int = 0,
    repeats: int = 0,
    device: torch.device | None = None,
    seed: int = 0,
    accumulate: int = 1,
    rank: Rank = ALONE,
) -> DataLoader[Batch]:
    """Return a loader of :class:`Batch`.

    Args:
        dataset: of :class:`ImageSets`.
        transform: from :func:`make_transform`.
        batch_size: in training images per optimizer step, over all processes; otherwise images per batch of this
            process.
        shuffle: whether this is training: the loader's ``batch_sampler`` is then a :class:`TrainOrder`.
        workers: processes that decode; 0 to decode in this one.
        repeats: copies of an image per batch (repeated augmentation); 0 for none.
        device: where the batches go, to pin memory for a GPU.
        seed: of order and augmentation, in training.
        accumulate: batches per optimizer step, in training.
        rank: which of the processes that share the images this is.

    Raises:
        ConfigError: if a training batch cannot be divided evenly, or a batch has no image.
    """
    check_count("batch_size", batch_size)
    images: int = len(dataset)  # type: ignore[arg-type]
    order: TrainOrder | EvaluationOrder = EvaluationOrder(images, batch_size, rank)
    if shuffle:
        order = TrainOrder(images, batch_size, seed, repeats=repeats, accumulate=accumulate, rank=rank)
    return DataLoader(
        Prepared(dataset, transform, substitute=shuffle),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device is not None and device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_sigterm,
        # Without one, every new iterator would draw a seed for its workers from the generator of the training.
        generator=torch.Generator().manual_seed(seed),
    )


def readable(loader: Batches, *, skip_corrupt: bool) -> Iterator[Batch]:
    """Yield the batches of ``loader``; in evaluation one may be empty, all of its images being unreadable.

    Raises:
        CorruptImageError: naming the first unreadable image and the way out, unless ``skip_corrupt``; in training also
            if no image can be read.
        DataError: if a process that decodes images was killed.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            killed = worker_killed(error)
            if killed is None:
                raise
            end_workers(getattr(batches, "_workers", ()))
            raise killed from error
        if batch is None:
            return
        if batch.unreadable and not skip_corrupt:
            raise CorruptImageError(f"{batch.unreadable[0].message} Mend or remove it, or go on with --skip-corrupt.")
        if not len(batch.labels) and isinstance(loader.batch_sampler, TrainOrder):
            raise CorruptImageError(f"{batch.unreadable[0].message} Nor can any other training image be read.")
        yield batch


def worker_killed(error: RuntimeError) -> DataError | None:
    """Return what PyTorch's error says where it tells of a worker process that was killed, else ``None``.

    PyTorch raises it wherever the training is when the signal arrives, and not only where a batch is asked for.
    """
    if not str(error).startswith("DataLoader worker"):
        return None
    return DataError(
        f"A process that decodes images has ended: {first_line(error)} Most often memory was not enough: give fewer "
        "--workers, and --resume where a run was saved."
    )


def end_workers(processes: Iterable[BaseProcess]) -> None:
    """End worker processes of which one was killed: it may hold a lock that the others, and then this one, wait for."""
    for process in processes:
        with contextlib.suppress(RuntimeError):  # PyTorch's, about the process that ends here
            process.kill()
            process.join()


def _collate(samples: Sequence[_Prepared]) -> Batch:
    unreadable = [image for *_, images in samples for image in images]
    images = [image for image, *_ in samples if image is not None]
    labels = [label for image, label, _, _ in samples if image is not None]
    numbers = [number for image, _, number, _ in samples if image is not None]
    stacked = torch.stack(images) if images else torch.empty(0)
    return Batch(stacked, torch.tensor(labels, dtype=torch.int64), unreadable, numbers)


def _ignore_sigterm(worker: int) -> None:
    """Where a scheduler signals every process, leave it to the training one, which saves and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
