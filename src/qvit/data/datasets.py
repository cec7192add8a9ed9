"""Data sets of decoded images with labels: every one decodes by :mod:`qvit.images`, whoever found the files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset

from qvit.data.shards import ShardFile
from qvit.errors import CorruptImageError, DataError
from qvit.files import first_line
from qvit.images import Mode, Picture, open_picture

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

    def __getitem__(self, index: int) -> tuple[Picture, int] | Unreadable:
        source = self.sources[index]
        try:
            if isinstance(source, ShardFile):
                return source.open(self.mode), self.labels[index]
            return open_picture(source, self.mode), self.labels[index]
        except CorruptImageError as error:
            # Returned, not raised: it may happen in a worker process, and the loop decides whether to go on.
            return Unreadable(str(error))

    def split(self, fraction: float) -> tuple[Images, Images]:
        """Return the images without and with a held-out ``fraction`` of each class, always the same ones."""
        labels = np.asarray(self.labels)
        rng = np.random.default_rng(_SPLIT_SEED)
        held = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            held[members[: max(1, round(fraction * len(members)))]] = True
        first, second = (
            Images([self.sources[i] for i in chosen], labels[chosen].tolist(), self.mode)
            for chosen in (np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist())
        )
        return first, second


class LibraryImages(Dataset[Any]):
    """The images of a map-style data set of torchvision, or of timm's readers, decoded here and not there.

    Args:
        dataset: from :func:`timm.data.create_dataset`; where it opens files by a ``loader``, that is taken out of it.
        name: what an error calls it.
        mode: ``"RGB"`` or ``"L"``.
    """

    def __init__(self, dataset: Dataset[Any], name: str, mode: Mode) -> None:
        self.items: Any = dataset.reader if isinstance(dataset, timm.data.ImageDataset) else dataset
        if callable(getattr(dataset, "loader", None)):
            dataset.loader = _unopened  # type: ignore[attr-defined]
        self.name, self.mode = name, mode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Picture, int] | Unreadable:
        name = f"{self.name} (image {index})"
        try:
            source, label, *_ = self.items[index]
        except Exception as error:  # whatever the library behind the name raises
            return Unreadable(f"{name} cannot be read: {first_line(error)}")
        with contextlib.closing(source) if hasattr(source, "read") else contextlib.nullcontext():
            try:
                return open_picture(source, self.mode, source if isinstance(source, str) else name), int(label)
            except CorruptImageError as error:
                return Unreadable(str(error))


def check_labels(images: LibraryImages, classes: Sequence[str]) -> None:
    """Look at the first sample, so that a split without labels is found before the training.

    Raises:
        DataError: if there is none, or its label is no class number.
    """
    if not len(images):
        raise DataError(f"{images.name} has a split without images.")
    with contextlib.suppress(OSError, SyntaxError):  # an image that cannot be opened has its turn later
        label = images.items[0][1]
        if not isinstance(label, (int, np.integer)) or not 0 <= label < len(classes):
            raise DataError(f"{images.name} has a split whose first image has the label {label!r}, which is no class.")


def _unopened(path: str) -> str:
    """Stand in for the ``loader`` of a torchvision data set."""
    return path
