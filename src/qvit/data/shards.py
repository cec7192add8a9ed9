"""WebDataset shards: tar files in which ``NAME.jpg`` (or png, webp) stands beside ``NAME.cls``, the class number.

The shards are listed once, header by header, and then read like a folder of files, by offset. So what holds for folders
holds for them: each image once an epoch whatever the number of processes, exact evaluation, and a run that goes on in
the middle of an epoch.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qvit.errors import DataError
from qvit.files import first_line
from qvit.images import Mode, open_image

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
CLASSES = "classes.txt"
"""Beside the shards, if there is one: a class name a line, in the order of the numbers."""


class ShardFile(NamedTuple):
    """An image inside an uncompressed tar file: where it begins, and its size in bytes."""

    shard: str
    offset: int
    size: int

    def open(self, mode: Mode) -> Image.Image:
        """Decode it as :func:`qvit.images.open_image` does.

        Raises:
            CorruptImageError: naming shard and offset.
        """
        try:
            # Opened anew each time: a descriptor kept open would be shared, position and all, by forked workers.
            with open(self.shard, "rb") as file:
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError:
            content = b""  # it was there when it was listed; the message below names it
        return open_image(f"{self.shard} (image at byte {self.offset})", mode, content)


def find_shards(folder: Path, part: str = "") -> list[Path]:
    """Return the tar files of a folder whose names contain ``part``, in order."""
    return sorted(path for path in folder.glob("*.tar") if part in path.name)


def read_shards(files: Sequence[Path]) -> tuple[list[ShardFile], list[int]]:
    """Return the images of some shards and their class numbers.

    Raises:
        DataError: naming the shard that is no tar file, or the image whose class number is absent or no number.
    """
    images: list[ShardFile] = []
    labels: list[int] = []
    for path in files:
        found: dict[str, ShardFile] = {}
        numbers: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if kind.lower() in IMAGE_TYPES:
                        found[f"{folder}/{stem}"] = ShardFile(str(path), member.offset_data, member.size)
                    elif kind == "cls" and (content := tar.extractfile(member)):
                        numbers[f"{folder}/{stem}"] = content.read()
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path} cannot be read as an uncompressed tar file: {first_line(error)}") from error
        for key, image in found.items():
            number = numbers.get(key, b"").strip()
            if not number.isdigit():
                raise DataError(f"{path} has no class number for {key.lstrip('/')}: expected a file .cls beside it.")
            images.append(image)
            labels.append(int(number))
    return images, labels


def class_names(folder: Path, labels: Sequence[int]) -> list[str]:
    """Return the class names of the shards in ``folder``: of ``classes.txt``, or else the numbers themselves.

    Raises:
        DataError: if there are fewer names than classes.
    """
    count = max(labels) + 1
    path = folder / CLASSES
    if not path.is_file():
        return [str(number) for number in range(count)]
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) < count:
        raise DataError(f"{path} names {len(names)} classes, the shards have {count}.")
    return names
