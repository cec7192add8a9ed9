"""Opening images and labels by name: the digits, image folders, tar shards, and the data sets that timm opens."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from qvit.data.datasets import Images, LibraryImages, check_labels
from qvit.data.listing import Visited, find_shards, list_folder, remark
from qvit.data.shards import class_names, read_shards
from qvit.data.splits import SPLITS, find_splits, find_validation, two_splits
from qvit.errors import DataError
from qvit.files import cut, printable
from qvit.images import Mode

TIMM_SOURCES = ("torch/", "hfds/")
_TORCH_FOLDERS = ("torch/image_folder", "torch/folder")
"""Names for an image folder: it is listed here, as every other one."""
HOLDOUT = 0.1
"""Share of each class's images held out for validation where a data set comes in one piece."""


@dataclasses.dataclass
class ImageSets:
    """Training and validation images with the names of their classes."""

    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]


def open_data(source: str, *, mode: Mode = "RGB", root: str | None = None, splits: str = SPLITS) -> ImageSets:
    """Open a data set; what a folder holds and is left out is said on the standard error stream.

    Args:
        source: ``"digits"``; a folder with ``train/`` and ``val/`` (or ``valid/``, ``validation/``, ``test/``; in any
            case), each with a folder a class or with WebDataset shards; a folder of class folders or of shards, of
            which a tenth is held out; ``"wds/"``, shards of both splits in one folder; or a name that
            :func:`timm.data.create_dataset` knows (``torch/cifar10``, ``hfds/...``).
        mode: ``"RGB"``, or ``"L"`` for a model with one input channel.
        root: folder of a timm data set or of ``"wds/"``.
        splits: names of the training and validation split of a timm data set or of a folder's two folders, or parts of
            the names of the shards.

    Raises:
        DataError: naming what is absent, ambiguous or does not fit; see :func:`qvit.data.listing.list_folder`.
    """
    if source == "digits":
        return _digits(mode)
    if source.startswith("wds/"):
        return _shards_in_one_folder(_existing(root or source.removeprefix("wds/")), splits, mode)
    folder = _image_folder(source, root)
    if folder is None:
        return _timm(source, root, splits, mode)
    found, visited = find_splits(folder, splits), Visited()
    if found is None:
        whole, classes = _folder(folder, mode, visited)
        for label, count in Counter(whole.labels).items():
            if count < 2:
                raise DataError(
                    f"{folder} has one image only of class {cut(classes[label])}, and some of each class are held out "
                    "for validation: give two or more of each, or the folders train/ and val/."
                )
        return ImageSets(*whole.split(HOLDOUT), classes)
    train, classes = _folder(found[0], mode, visited)
    return ImageSets(train, _folder(found[1], mode, visited, classes, str(found[0]))[0], classes)


def open_validation(
    source: str, classes: list[str], *, mode: Mode = "RGB", root: str | None = None, splits: str = SPLITS
) -> Dataset[Any]:
    """Open the validation images alone; of a folder without splits all images.

    Raises:
        DataError: naming what is absent, or if the classes are not ``classes``.
    """
    folder = None if source == "digits" or source.startswith("wds/") else _image_folder(source, root)
    if folder is not None:
        return _folder(find_validation(folder, splits), mode, Visited(), classes, "the checkpoint")[0]
    sets = open_data(source, mode=mode, root=root, splits=splits)
    check_classes(f"the data set {source}", sets.classes, "the checkpoint", classes)
    return sets.val


def check_classes(first: str, classes: Sequence[str], second: str, other_classes: Sequence[str]) -> None:
    """Raise unless both have the same classes in the same order.

    Raises:
        DataError: with both numbers, or the first class that differs.
    """
    if len(classes) != len(other_classes):
        raise DataError(
            f"{_capital(first)} has {len(classes)} classes, {second} {len(other_classes)}: they must be the same."
        )
    for index, (a, b) in enumerate(zip(classes, other_classes, strict=True)):
        if a != b:
            raise DataError(f"Class {index} is {a!r} in {first} and {b!r} in {second}: they must be the same.")


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


def _image_folder(source: str, root: str | None) -> Path | None:
    """Return the folder that a source means, or ``None`` if timm is to open it."""
    if source.lower() in _TORCH_FOLDERS:
        if not root:
            raise DataError(f"{source} needs the folder of the images: give --data-root.")
        return _existing(root)
    return None if source.startswith(TIMM_SOURCES) else _existing(source)


def _folder(
    folder: Path, mode: Mode, visited: Visited, classes: list[str] | None = None, whose: str = ""
) -> tuple[Images, list[str]]:
    """Open one folder of class folders or of shards; its classes must be ``classes``, those of ``whose``, if given."""
    listing = list_folder(folder, visited)
    _say(listing.remark())
    if listing.shards:
        return _shards(listing.shards, mode, classes)
    if classes is not None:
        listing.check_classes(classes, whose)
    elif len(listing.classes) < 2:
        raise DataError(f"{folder} has images of one class only: expected one folder a class.")
    classes = classes or listing.classes
    return Images(*listing.samples(classes), mode), classes


def _shards(files: Sequence[Path], mode: Mode, classes: list[str] | None = None) -> tuple[Images, list[str]]:
    """Open some shards of one folder; with ``classes``, check that there is one for every label."""
    images, labels, left_out = read_shards(files)
    folder = files[0].parent
    _say(remark(folder, left_out))
    if not images:
        raise DataError(
            f"{folder} holds shards without images: expected files .jpg, .png or others that Pillow decodes."
        )
    names = class_names(folder, labels)
    if classes is not None and max(labels) >= len(classes):
        raise DataError(f"{folder} has an image of class {max(labels)}, and there are {len(classes)} classes.")
    return Images(images, labels, mode), classes or names


def _shards_in_one_folder(folder: Path, splits: str, mode: Mode) -> ImageSets:
    parts = two_splits(splits)
    files = [find_shards(folder, part) for part in parts]
    for part, found in zip(parts, files, strict=True):
        if not found:
            raise DataError(f"{folder} has no shard with {part!r} in its name: give --splits TRAINING,VALIDATION.")
    shared = set(files[0]) & set(files[1])
    if shared:
        raise DataError(
            f"{min(shared)} is of both splits, its name has {' and '.join(parts)} in it: give other --splits."
        )
    train, classes = _shards(files[0], mode)
    return ImageSets(train, _shards(files[1], mode, classes)[0], classes)


def _timm(source: str, root: str | None, splits: str, mode: Mode) -> ImageSets:
    try:
        train, val = (timm.data.create_dataset(source, root=root, split=split) for split in two_splits(splits))
    except DataError:
        raise
    except Exception as error:  # whatever the library behind the name raises: the user asked for it by name
        reason = cut(" ".join(str(error).split())) or type(error).__name__
        raise DataError(f"timm cannot open {source} (root {root}, splits {splits}): {reason}") from error
    if isinstance(train, IterableDataset) or isinstance(val, IterableDataset):
        raise DataError(f"{source} is a stream: qvit needs images that it can fetch by number, once each an epoch.")
    classes = _class_names(train)
    check_classes(f"the training split of {source}", classes, "the validation split", _class_names(val))
    first, second = (LibraryImages(dataset, source, mode) for dataset in (train, val))
    for images in (first, second):
        check_labels(images, classes)
    return ImageSets(first, second, classes)


def _say(remark: str) -> None:
    if remark and os.environ.get("RANK", "0") == "0":  # one process says it
        print(f"qvit: {printable(remark)}", file=sys.stderr)


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
