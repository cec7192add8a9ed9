"""What is in a folder of images: the one place that says what counts as an image, a class or a split.

Everything is taken, left out and said so, or refused by name; nothing disappears in silence.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qvit.errors import DataError
from qvit.files import cut, first_line
from qvit.images import suffixes

_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval|evaluation|holdout)"
    r"([ _-]?(set|split|data|dataset|images?|\d+))*",
    re.IGNORECASE,
)
"""Names that look like a split of a data set, and so are no class."""
_LITTER = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
"""Folders that systems leave behind."""
CLASSES = "classes.txt"
"""Beside shards, if there is one: a class name a line, in the order of the numbers."""
KINDS = ".jpg, .png, .webp or other files that Pillow decodes"
_NAMED = 5
"""Suffixes or classes that a sentence names."""


Check = Callable[[str, Sequence[os.DirEntry[str]], int], None]


@dataclasses.dataclass
class Listing:
    """What was found in a folder.

    Args:
        folder: the folder.
        images: paths of the images by class, that is by the name of the folder they are in; in no order.
        shards: tar files, in the order of their names.
        left_out: what was left out, by kind.
        deeper: images that lie in folders inside the class folders.
    """

    folder: Path
    images: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    shards: list[Path] = dataclasses.field(default_factory=list)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    deeper: int = 0

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of their numbers, as timm has it: digits count as numbers."""
        return sorted(self.images, key=lambda name: (natural_key(name), name))

    def samples(self, classes: Sequence[str]) -> tuple[list[str], list[int]]:
        """Return paths and class numbers of all images, in the order of the paths, as timm has it."""
        numbers = {name: number for number, name in enumerate(classes)}
        found = [(path, numbers[name]) for name, paths in self.images.items() for path in paths]
        found.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
        return [path for path, _ in found], [number for _, number in found]

    def check_classes(self, classes: Sequence[str], source: str) -> None:
        """Raise unless the classes are those of ``source``, in whatever order.

        Raises:
            DataError: with the names of the missing and of the other ones.
        """
        missing = [name for name in classes if name not in self.images]
        others = [name for name in self.classes if name not in set(classes)]
        same = f"its {len(self.images)} classes must be the {len(classes)} of {cut(source)}."
        if missing:
            but = f", but {some(others)}" if others else ""
            raise DataError(f"{cut(str(self.folder))} has no folder {some(missing)}{but}: {same}")
        if others:
            raise DataError(f"{cut(str(self.folder))} has a folder {some(others)}: {same}")

    def remark(self) -> str:
        """Return one line that says what was left out and what may surprise, or an empty one."""
        deeper = [f"{self.deeper} images lie in folders inside the class folders and are of these classes"]
        return remark(self.folder, self.left_out, deeper if self.deeper else [])


class Visited:
    """The folders that were listed for one data set, so that no image counts twice."""

    def __init__(self) -> None:
        self._paths: dict[str, str] = {}  # by real path: of the folders, and of all folders that these are in
        self._around: dict[str, str] = {}

    def enter(self, path: str) -> None:
        """Note a folder.

        Raises:
            DataError: if it is one that was listed before, or holds it: then a link leads there.
        """
        real = Path(os.path.realpath(path))
        known = self._paths.get(str(real)) or self._around.get(str(real))
        if known:
            raise DataError(
                f"{cut(path)} leads to {cut(known)} again, by a link: its images would count twice. Remove the link."
            )
        self._paths[str(real)] = path
        self._around.update((str(parent), path) for parent in real.parents if str(parent) not in self._paths)


def list_folder(folder: Path, visited: Visited) -> Listing:
    """Return what is in a folder: class folders with images, or shards.

    Images are the files with a suffix that Pillow decodes (:func:`qvit.images.suffixes`), in any case; those in folders
    inside a class folder are of its class. Left out and counted are hidden files and folders, files of other suffixes,
    and what systems leave behind.

    Args:
        folder: to be listed.
        visited: the folders of the same data set that were listed before.

    Raises:
        DataError: naming a folder that cannot be read, that is a link to one listed already, that looks like a split,
            or that has no images; pictures or shards beside class folders.
    """
    listing = Listing(folder)
    visited.enter(str(folder))
    pictures, empty = [], []
    for entry in entries_of(str(folder)):
        if entry.name == CLASSES or is_left_out(entry, listing.left_out):
            continue
        if is_folder(entry):
            images = list(walk(entry.path, listing.left_out, visited, _refuse_split))
            listing.deeper += sum(depth > 0 for _, depth in images)
            if images:
                listing.images[entry.name] = [path for path, _ in images]
            else:
                empty.append(entry)
        elif _suffix(entry.name) == ".tar":
            listing.shards.append(Path(entry.path))
        elif is_image(entry, listing.left_out):
            pictures.append(entry)
    if listing.shards and listing.images:
        raise DataError(
            f"{folder} has shards ({listing.shards[0].name}) and class folders: give them folders of their own."
        )
    if pictures and not listing.shards:
        raise DataError(
            f"{cut(pictures[0].path)} is an image outside the class folders ({len(pictures)} such): move it into the "
            "folder of its class, or away."
        )
    if empty and not listing.shards:
        raise DataError(
            f"{cut(empty[0].path)} holds no images ({KINDS}): a class needs some; fill or remove the folder."
        )
    if pictures or empty:
        listing.left_out["what is beside the shards"] += len(pictures) + len(empty)
    if not listing.shards and not listing.images:
        raise DataError(f"{folder} holds no images: expected one folder a class with {KINDS} in it, or shards (.tar).")
    return listing


def find_shards(folder: Path, part: str) -> list[Path]:
    """Return the tar files of a folder whose names contain ``part``, in order.

    Raises:
        DataError: if the folder cannot be read.
    """
    tars = [entry for entry in entries_of(str(folder)) if _suffix(entry.name) == ".tar" and not is_litter(entry.name)]
    return [Path(entry.path) for entry in tars if part in entry.name]


def remark(folder: Path, left_out: Counter[str], more: Sequence[str] = ()) -> str:
    """Return one line that says what was left out of a folder, by kind, and what ``more`` says, or an empty one."""
    kinds = [f"{count} {kind}" for kind, count in left_out.most_common()]
    parts = [f"left out {some(kinds)}", *more] if kinds else more
    return f"{cut(str(folder))}: {'; '.join(parts)}." if parts else ""


def is_litter(name: str) -> bool:
    """Return whether a file or folder of that name is hidden or left behind by a system."""
    return name.startswith(".") or name in _LITTER


def looks_like_split(name: str) -> bool:
    """Return whether a folder's name looks like a part of a data set (``Train``, ``val2017``, ``test_set``)."""
    return _SPLIT.fullmatch(name) is not None


def natural_key(text: str) -> list[str | int]:
    """Return a key that sorts ``text`` as timm does: without regard to case, digits as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def entries_of(folder: str) -> list[os.DirEntry[str]]:
    """Return what is in a folder, in the order of the names.

    Raises:
        DataError: if the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{cut(folder)} cannot be read ({reason}): its images would be missing.") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a folder, or a link to one.

    Raises:
        DataError: if that cannot be found out.
    """
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself, or into a folder that is closed
        raise DataError(f"{cut(entry.path)} cannot be read ({error.strerror}).") from error


def some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(cut(name, 60) for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def walk(
    path: str, left_out: Counter[str], visited: Visited, check: Check | None = None, depth: int = 0
) -> Iterator[tuple[str, int]]:
    """Yield the images in a folder and in the folders inside it, and how deep each lies, from 0.

    Args:
        path: of the folder.
        left_out: counts what is left out.
        visited: the folders that were listed before.
        check: is called with every folder's path, what is in it, and its depth.
        depth: of the folder.

    Raises:
        DataError: if a folder cannot be read or a link leads to one again; or what ``check`` raises.
    """
    visited.enter(path)
    entries = [entry for entry in entries_of(path) if not is_left_out(entry, left_out)]
    if check is not None:
        check(path, entries, depth)
    for entry in entries:
        if is_folder(entry):
            yield from walk(entry.path, left_out, visited, check, depth + 1)
        elif is_image(entry, left_out):
            yield entry.path, depth


def _refuse_split(path: str, entries: Sequence[os.DirEntry[str]], depth: int) -> None:
    """Refuse a class folder, or one inside it, that looks like a split.

    A class may have the name of one (CIFAR-100 has the class "train"), but then it has images and no folders.
    """
    if looks_like_split(os.path.basename(path)) and (depth or any(map(is_folder, entries))):
        raise DataError(
            f"{cut(path)} looks like a split of a data set and not like a class: give the folder that holds "
            "train/ and val/, or rename it."
        )


def is_left_out(entry: os.DirEntry[str], left_out: Counter[str]) -> bool:
    """Return whether a file or folder is left out by its name, and count it."""
    if is_litter(entry.name):
        left_out["hidden files and litter"] += 1
    return is_litter(entry.name)


def is_image(entry: os.DirEntry[str], left_out: Counter[str]) -> bool:
    """Return whether a file is an image by its suffix, and count it if it is not."""
    suffix = _suffix(entry.name)
    if suffix in suffixes() and (entry.is_file() or not os.path.exists(entry.path)):
        return True  # a broken link too: what cannot be read is named when it is to be
    kind = (
        "devices and pipes"
        if suffix in suffixes()
        else f"{cut(suffix, 20)} files"
        if suffix
        else "files without a suffix"
    )
    left_out[kind] += 1
    return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
