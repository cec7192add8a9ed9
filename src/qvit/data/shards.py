"""WebDataset shards: tar files in which ``NAME.jpg`` (or another image) stands beside ``NAME.cls``, the class number.

The shards are listed once, header by header, and then read like a folder of files, by offset. So what holds for folders
holds for them: each image once per epoch whatever the number of processes, exact evaluation, and a run that goes on in
the middle of an epoch.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qvit.data.listing import CLASSES, is_litter
from qvit.errors import DataError
from qvit.files import first_line
from qvit.images import Mode, Picture, open_picture, suffixes

_DIGITS = 6
"""Of the greatest class number."""


class ShardFile(NamedTuple):
    """An image inside an uncompressed tar file: where it begins, and its size in bytes."""

    shard: str
    offset: int
    size: int

    def open(self, mode: Mode) -> Picture:
        """Decode it as :func:`qvit.images.open_picture` does.

        Raises:
            CorruptImageError: naming shard and offset.
        """
        try:
            # Opened anew each time: a descriptor kept open would be shared, position and all, by forked workers.
            with open(self.shard, "rb") as file:
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError:
            content = b""  # it was there when it was listed; the message below names it
        return open_picture(content, mode, f"{self.shard} (image at byte {self.offset})")


def read_shards(files: Sequence[Path]) -> tuple[list[ShardFile], list[int], Counter[str]]:
    """Return the images of some shards, their class numbers, and what was left out, by kind.

    A file is an image by its suffix, as in a folder (:mod:`qvit.data.listing`).

    Raises:
        DataError: naming the shard that is no tar file, or the image whose class number is absent or no number, or that
            is there in two formats.
    """
    images: list[ShardFile] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for path in files:
        found: dict[str, ShardFile] = {}
        numbers: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    key = f"{folder}/{stem}"
                    if member.isdir():
                        continue
                    if any(map(is_litter, member.name.removeprefix("./").split("/"))):
                        left_out["hidden files and litter"] += 1
                    elif kind == "cls" and (content := tar.extractfile(member)):
                        numbers[key] = content.read(_DIGITS + 1)
                    elif f".{kind.lower()}" not in suffixes() or not member.isreg() or member.issparse():
                        left_out[f".{kind} files" if kind else "files without a suffix"] += 1
                    elif key in found:
                        raise DataError(f"{path} has two images called {key.lstrip('/')}: which one is meant?")
                    else:
                        found[key] = ShardFile(str(path), member.offset_data, member.size)
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path} cannot be read as an uncompressed tar file: {first_line(error)}") from error
        for key, image in found.items():
            number = numbers.pop(key, b"").strip()
            if not number.isdigit() or len(number) > _DIGITS:
                raise DataError(f"{path} has no class number for {key.lstrip('/')}: expected a file .cls beside it.")
            images.append(image)
            labels.append(int(number))
        if numbers:
            left_out["class numbers without an image"] += len(numbers)
    return images, labels, left_out


def class_names(folder: Path, labels: Sequence[int]) -> list[str]:
    """Return the class names of the shards in ``folder``: of ``classes.txt``, or else the numbers themselves.

    Raises:
        DataError: if there are fewer names than classes, or the file is no text.
    """
    count = max(labels) + 1
    path = folder / CLASSES
    if not path.is_file():
        return [str(number) for number in range(count)]
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text (UTF-8): {first_line(error)}") from error
    if len(names) < count:
        raise DataError(f"{path} names {len(names)} classes, the shards have {count}.")
    return names
