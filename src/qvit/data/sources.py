"""Images and labels: the digits, image folders, tar shards, and the map-style data sets that timm opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm.data
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.utils.data import Dataset, IterableDataset

from qvit.data.shards import ShardFile, class_names, find_shards, read_shards
from qvit.errors import CorruptImageError, DataError
from qvit.images import Mode, open_image

TIMM_SOURCES = ("torch/", "hfds/")
VAL_FOLDERS = ("val", "validation", "test")
HOLDOUT = 0.1
"""Share of each class's images held out for validation where a data set comes in one piece."""
_SPLIT_SEED = 0


class Unreadable(NamedTuple):
    """What an image that cannot be decoded leaves in place of a sample."""

    message: str


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
