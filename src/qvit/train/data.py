"""Images and labels: the digits, image folders, tar shards, and the map-style data sets that timm opens."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qvit.errors import CorruptImageError, DataError
from qvit.images import Mode, open_image
from qvit.train.order import ALONE, EvaluationOrder, Sample, Share, TrainOrder
from qvit.train.randomness import seeded
from qvit.train.shards import ShardFile, class_names, find_shards, read_shards

TIMM_SOURCES = ("torch/", "hfds/")
VAL_FOLDERS = ("val", "validation", "test")
HOLDOUT = 0.1
"""Share of each class's images held out for validation where a data set comes in one piece."""
_SPLIT_SEED = 0

Transform = Callable[[Image.Image], Tensor]


class Unreadable(NamedTuple):
    """What an image that cannot be decoded leaves in place of a sample."""

    message: str


class Batch(NamedTuple):
    """``images (B, C, H, W)`` float32, ``labels (B,)`` int64, and the samples that could not be read."""

    images: Tensor
    labels: Tensor
    unreadable: list[Unreadable]


class Batches(Protocol):
    """What training and evaluation walk through: a :class:`DataLoader`, or a loader of images in memory."""

    @property
    def batch_sampler(self) -> Any:
        """The :class:`TrainOrder` or :class:`EvaluationOrder` of the batches."""

    def __len__(self) -> int:
        """Return how many batches there are."""

    def __iter__(self) -> Iterator[Batch]:
        """Walk through them."""


class Images(Dataset[Any]):
    """Images with labels, decoded when asked for.

    Args:
        sources: file paths, files inside tar shards, or the images themselves.
        labels: class numbers.
        mode: ``"RGB"`` or ``"L"``.
    """

    def __init__(self, sources: Sequence[str | ShardFile | Image.Image], labels: Sequence[int], mode: Mode) -> None:
        self.sources, self.labels, self.mode = sources, labels, mode

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Image.Image, int] | Unreadable:
        source = self.sources[index]
        try:
            if isinstance(source, ShardFile):
                return source.open(self.mode), self.labels[index]
            return (source if isinstance(source, Image.Image) else open_image(source, self.mode)), self.labels[index]
        except CorruptImageError as error:
            # Returned, not raised: it may happen in a worker process, and the loop decides whether to go on.
            return Unreadable(str(error))

    def split(self, share: float) -> tuple[Images, Images]:
        """Return the images without and with a held-out ``share`` of each class, always the same ones."""
        labels = np.asarray(self.labels)
        rng = np.random.default_rng(_SPLIT_SEED)
        held = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            held[members[: max(1, round(share * len(members)))]] = True
        first, second = (
            Images([self.sources[i] for i in chosen], labels[chosen].tolist(), self.mode)
            for chosen in (np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist())
        )
        return first, second


@dataclasses.dataclass
class ImageSets:
    """Training and validation images with the names of their classes."""

    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]


def open_data(
    source: str, *, mode: Mode = "RGB", root: str | None = None, splits: str = "train,validation"
) -> ImageSets:
    """Open a data set.

    Args:
        source: ``"digits"``; a folder with ``train/`` and ``val/`` (or ``validation/``, ``test/``), each with a folder
            a class or with WebDataset shards; a folder of class folders or of shards, of which a tenth is held out;
            ``"wds/"``, shards of both splits in one folder; or a name that :func:`timm.data.create_dataset` knows
            (``torch/cifar10``, ``hfds/...``).
        mode: ``"RGB"``, or ``"L"`` for a model with one input channel.
        root: folder of a timm data set or of ``"wds/"``.
        splits: names of the training and validation split of a timm data set, or parts of the names of the shards.

    Raises:
        DataError: naming what is absent or does not fit.
    """
    if source == "digits":
        return _digits(mode)
    if source.startswith("wds/"):
        return _shards_in_one_folder(_existing(root or source.removeprefix("wds/")), splits, mode)
    if source.startswith(TIMM_SOURCES):
        return _timm(source, root, splits, mode)
    folder = _existing(source)
    if not (folder / "train").is_dir():
        whole, classes = _folder(folder, mode)
        return ImageSets(*whole.split(HOLDOUT), classes)
    train, classes = _folder(folder / "train", mode)
    for name in VAL_FOLDERS:
        if (folder / name).is_dir():
            return ImageSets(train, _folder(folder / name, mode, classes)[0], classes)
    raise DataError(f"{folder} has train/ and no {'/, '.join(VAL_FOLDERS)}/ beside it.")


def open_validation(
    source: str, classes: list[str], *, mode: Mode = "RGB", root: str | None = None, splits: str = "train,validation"
) -> Dataset[Any]:
    """Open the validation images alone; of a folder without ``val/`` all images.

    Raises:
        DataError: naming what is absent, or if the classes are not ``classes``.
    """
    folder = Path(source)
    if source != "digits" and not source.startswith(("wds/", *TIMM_SOURCES)):
        _existing(source)
        inner = next((folder / name for name in VAL_FOLDERS if (folder / name).is_dir()), folder)
        return _folder(inner, mode, classes)[0]
    sets = open_data(source, mode=mode, root=root, splits=splits)
    check_classes(f"the data set {source}", sets.classes, "the checkpoint", classes)
    return sets.val


def check_classes(one: str, its: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raise unless both have the same classes in the same order.

    Raises:
        DataError: with both numbers, or the first class that differs.
    """
    if len(its) != len(others):
        raise DataError(f"{_capital(one)} has {len(its)} classes, {other} {len(others)}: they must be the same.")
    for index, (a, b) in enumerate(zip(its, others, strict=True)):
        if a != b:
            raise DataError(f"Class {index} is {a!r} in {one} and {b!r} in {other}: they must be the same.")


def make_transform(preprocessing: Mapping[str, Any], augmentation: Mapping[str, Any] | None = None) -> Transform:
    """Return timm's evaluation transform, or its training transform if an ``augmentation`` is given.

    Args:
        preprocessing: input_size, mean, std, crop_pct, crop_mode and interpolation, as a checkpoint holds them.
        augmentation: arguments of :func:`timm.data.create_transform`.
    """
    if augmentation is None:
        transform: Transform = timm.data.create_transform(**preprocessing, is_training=False)
        return transform
    kept = {name: preprocessing[name] for name in ("input_size", "mean", "std")}
    training: Transform = timm.data.create_transform(**{**kept, **augmentation}, is_training=True)
    return training


class Prepared(Dataset[Any]):
    """Images by a transform, each with randomness of its own, so that it does not matter which process draws it.

    Args:
        images: gives (image, label) pairs or :class:`Unreadable`.
        transform: from :func:`make_transform`.
        substitute: whether the next readable image stands in for an unreadable one, so that batches stay whole.
    """

    def __init__(self, images: Dataset[Any], transform: Transform, *, substitute: bool) -> None:
        self.images, self.transform, self.substitute = images, transform, substitute

    def __getitem__(self, sample: Sample) -> tuple[Tensor | None, int, list[Unreadable]]:
        """Return the transformed image or ``None``, its label, and what could not be read in its place."""
        unreadable: list[Unreadable] = []
        tries = len(self.images) if self.substitute else 1  # type: ignore[arg-type]
        for step in range(tries):
            item = self.images[(sample.image + step) % len(self.images)]  # type: ignore[arg-type]
            if not isinstance(item, Unreadable):
                with seeded(sample.seed):
                    return self.transform(item[0]), int(item[1]), unreadable
            unreadable = unreadable or [item]
        return None, -1, unreadable


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
    share: Share = ALONE,
) -> DataLoader[Batch]:
    """Return a loader of :class:`Batch`.

    Args:
        dataset: of :class:`ImageSets`.
        transform: from :func:`make_transform`.
        batch_size: in training images an optimizer step, over all processes; otherwise images a batch of this process.
        shuffle: whether this is training: the loader's ``batch_sampler`` is then a :class:`TrainOrder`.
        workers: processes that decode; 0 to decode in this one.
        repeats: copies of an image a batch (repeated augmentation); 0 for none.
        device: where the batches go, to pin memory for a GPU.
        seed: of order and augmentation, in training.
        accumulate: batches an optimizer step, in training.
        share: which of the processes that share the images this is.

    Raises:
        ConfigError: if a training batch cannot be divided evenly.
    """
    images: int = len(dataset)  # type: ignore[arg-type]
    order: TrainOrder | EvaluationOrder = EvaluationOrder(images, batch_size, share)
    if shuffle:
        order = TrainOrder(images, batch_size, seed, repeats=repeats, accumulate=accumulate, share=share)
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
    """
    for batch in loader:
        if batch.unreadable and not skip_corrupt:
            raise CorruptImageError(f"{batch.unreadable[0].message} Mend or remove it, or go on with --skip-corrupt.")
        if not len(batch.labels) and isinstance(loader.batch_sampler, TrainOrder):
            raise CorruptImageError(f"{batch.unreadable[0].message} Nor can any other training image be read.")
        yield batch


def _collate(samples: Sequence[tuple[Tensor | None, int, list[Unreadable]]]) -> Batch:
    unreadable = [one for _, _, those in samples for one in those]
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    return Batch(torch.stack(images) if images else torch.empty(0), torch.tensor(labels, dtype=torch.int64), unreadable)


def _ignore_sigterm(worker: int) -> None:
    """Where a scheduler signals every process, leave it to the training one, which saves and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _digits(mode: Mode) -> ImageSets:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray(np.round(i * (255 / 16)).astype(np.uint8)).convert(mode) for i in digits.images]
    train, val = Images(images, digits.target.tolist(), mode).split(0.2)
    return ImageSets(train, val, [str(name) for name in digits.target_names])


def _existing(source: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {source}: --data takes digits, a folder of images or shards, wds/FOLDER, or a timm "
            f"data set ({'NAME, '.join(TIMM_SOURCES)}NAME)."
        )
    return folder


def _folder(folder: Path, mode: Mode, classes: list[str] | None = None) -> tuple[Images, list[str]]:
    """Open one folder of class folders or of shards; with ``classes``, check that it has the same."""
    shards = find_shards(folder)
    if shards:
        return _shards(shards, mode, classes)
    found, class_to_index = find_images_and_targets(str(folder))
    names = sorted(class_to_index, key=lambda name: class_to_index[name])
    if not found:
        raise DataError(
            f"{folder} holds no images: expected one folder a class with .jpg, .png or .webp files in it, or shards "
            "(.tar)."
        )
    if classes is None:
        if len(names) < 2:
            raise DataError(f"{folder} has images of one class only: expected one folder a class.")
        classes = names
    else:
        check_classes(str(folder), names, "the training images or checkpoint", classes)
    return Images([path for path, _ in found], [label for _, label in found], mode), classes


def _shards(files: Sequence[Path], mode: Mode, classes: list[str] | None = None) -> tuple[Images, list[str]]:
    """Open some shards of one folder; with ``classes``, check that there is one for every label."""
    images, labels = read_shards(files)
    if not images:
        raise DataError(f"{files[0].parent} holds shards without images: expected .jpg, .png or .webp files in them.")
    names = class_names(files[0].parent, labels)
    if classes is not None and max(labels) >= len(classes):
        raise DataError(f"{files[0].parent} has an image of class {max(labels)}, and there are {len(classes)} classes.")
    return Images(images, labels, mode), classes or names


def _shards_in_one_folder(folder: Path, splits: str, mode: Mode) -> ImageSets:
    parts = splits.split(",")[:2]
    files = [find_shards(folder, part) for part in parts]
    for part, found in zip(parts, files, strict=True):
        if not found:
            raise DataError(f"{folder} has no shard with {part!r} in its name: give --splits TRAINING,VALIDATION.")
    train, classes = _shards(files[0], mode)
    return ImageSets(train, _shards(files[-1], mode, classes)[0], classes)


def _timm(source: str, root: str | None, splits: str, mode: Mode) -> ImageSets:
    train_split, _, val_split = splits.partition(",")
    try:
        train, val = (
            timm.data.create_dataset(source, root=root, split=split, input_img_mode=mode)
            for split in (train_split, val_split)
        )
    except Exception as error:  # whatever the library behind the name raises: the user asked for it by name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"timm cannot open {source} (root {root}, splits {splits}): {reason}") from error
    if isinstance(train, IterableDataset) or isinstance(val, IterableDataset):
        raise DataError(f"{source} is a stream: qvit needs images that it can fetch by number, once each an epoch.")
    return ImageSets(train, val, _class_names(train))


def _class_names(dataset: Any) -> list[str]:
    reader = getattr(dataset, "reader", None)
    inner = getattr(reader, "dataset", dataset)
    names = getattr(inner, "classes", None) or getattr(inner, "class_to_idx", None)
    if names is None and hasattr(inner, "features"):  # Hugging Face datasets
        names = next((f.names for f in inner.features.values() if hasattr(f, "names")), None)
    if names is None and getattr(reader, "class_to_idx", None):
        names = reader.class_to_idx  # type: ignore[union-attr]
    if not names:
        raise DataError(f"The data set {type(inner).__name__} does not say what its classes are.")
    return [str(name) for name in names]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
