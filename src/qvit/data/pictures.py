"""Pictures without labels: a folder of any depth, some of its pictures to work with and some held out."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from qvit.config import check_count
from qvit.data.datasets import Images
from qvit.data.listing import KINDS, Visited, natural_key, remark, walk
from qvit.errors import DataError
from qvit.images import Mode

HELD_OUT = 0.2
"""Fraction of a folder's pictures that is held out where there are too few for all that is asked for."""


class Pictures(NamedTuple):
    """Pictures to work with, others that are held out (the same ones if the folder has but one), and a remark.

    The remark says in one line what of the folder was left out; it may be empty.
    """

    used: Images
    held_out: Images
    remark: str


def open_pictures(folder: Path, mode: Mode, *, count: int, held_out: int, seed: int = 0) -> Pictures:
    """Choose pictures of a folder and of the folders inside it, at any depth; what the folders are called is no label.

    Pictures are the files with a suffix that Pillow decodes, in any case. Left out and counted are hidden files and
    folders, files of other suffixes, and what systems leave behind.

    Args:
        folder: to choose from.
        mode: ``"RGB"`` or ``"L"``.
        count: pictures to work with, at most.
        held_out: pictures held out, at most, and at most :data:`HELD_OUT` of all.
        seed: of the choice.

    Raises:
        DataError: if the folder is absent, cannot be read or holds no picture, or a link leads into it again.
    """
    check_count("the pictures to work with", count)
    check_count("the pictures held out", held_out)
    paths, said = _listed(folder)
    random.Random(seed).shuffle(paths)
    apart = min(held_out, max(1, round(HELD_OUT * len(paths)))) if len(paths) > 1 else 0
    first, second = paths[:apart], paths[apart : apart + count]
    return Pictures(
        Images(second, [0] * len(second), mode),
        Images(first or second, [0] * len(first or second), mode),
        said,
    )


def all_pictures(folder: Path, mode: Mode) -> tuple[Images, str]:
    """Return every picture of a folder, in the order of the paths, and the remark; otherwise as :func:`open_pictures`.

    Raises:
        DataError: as :func:`open_pictures`.
    """
    paths, said = _listed(folder)
    return Images(paths, [0] * len(paths), mode), said


def _listed(folder: Path) -> tuple[list[str], str]:
    """Return the paths of all pictures in a folder and the folders inside it, and what was left out."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: --images takes a folder with pictures in it, at any depth.")
    left_out: Counter[str] = Counter()
    paths = [path for path, _ in walk(str(folder), left_out, Visited())]
    paths.sort(key=lambda path: (natural_key(path), path))
    if not paths:
        raise DataError(f"{folder} holds no pictures ({KINDS}), nor do the folders in it.")
    return paths, remark(folder, left_out)
