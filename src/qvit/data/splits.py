"""Which folders of a data set hold its training and its validation images, whatever the case of their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvit.data.listing import entries_of, is_folder, is_litter, looks_like_split, some
from qvit.errors import DataError
from qvit.files import cut

VAL_FOLDERS = ("val", "valid", "validation", "test")
"""Names of the folder of the validation images, beside ``train``, in any case; the first that there is counts."""
SPLITS = "train,validation"
"""The splits that are opened where nothing else is asked for."""


def find_splits(folder: Path, splits: str = SPLITS) -> tuple[Path, Path] | None:
    """Return the folders of training and validation images inside ``folder``, or ``None`` if it has no splits.

    Args:
        folder: of the data set.
        splits: names of the two folders; by default ``train`` and one of :data:`VAL_FOLDERS`. Case does not matter.

    Raises:
        DataError: if one of two is there, two differ in case only, or a folder looks like a split and is neither.
    """
    first, second = two_splits(splits)
    names = _folders(folder)
    train = _named(folder, names, (first,))
    val = _named(folder, names, VAL_FOLDERS if splits == SPLITS else (second,))
    if train and val:
        return train, val
    if splits != SPLITS:
        raise DataError(f"{folder} has no folder {second if train else first}: --splits names two folders in it.")
    if train:
        raise DataError(f"{folder} has {train.name}/ and no {'/, '.join(VAL_FOLDERS)}/ beside it.")
    _refuse_splits(folder, names, "train")
    return None


def find_validation(folder: Path, splits: str = SPLITS) -> Path:
    """Return the folder of validation images inside ``folder``, or itself if it has no splits.

    Raises:
        DataError: as :func:`find_splits`.
    """
    names = _folders(folder)
    asked = VAL_FOLDERS if splits == SPLITS else two_splits(splits)[1:]
    val = _named(folder, names, asked)
    if val is None and splits != SPLITS:
        raise DataError(f"{folder} has no folder {asked[0]}: --splits names two folders in it.")
    if val is None and not looks_like_split(folder.resolve().name):
        _refuse_splits(folder, names, "/, ".join(VAL_FOLDERS))
    return val or folder


def two_splits(splits: str) -> tuple[str, str]:
    """Return the names of the training and of the validation split.

    Raises:
        DataError: if there are not two different ones.
    """
    names = [name.strip() for name in splits.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise DataError(f"--splits takes two different names, TRAINING,VALIDATION, not {cut(splits)!r}.")
    return names[0], names[1]


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in entries_of(str(folder)) if is_folder(entry) and not is_litter(entry.name)]


def _named(folder: Path, names: Sequence[str], wanted: Sequence[str]) -> Path | None:
    """Return the folder of one of the names that are wanted, the first that there is, in any case."""
    for wanted_name in wanted:
        found = [name for name in names if name.casefold() == wanted_name.casefold()]
        if len(found) > 1:
            raise DataError(f"{folder} has {' and '.join(found)}, which differ in case only: keep one of them.")
        if found:
            return folder / found[0]
    return None


def _refuse_splits(folder: Path, names: Sequence[str], wanted: str) -> None:
    found = [name for name in names if looks_like_split(name)]
    if found:
        raise DataError(
            f"{folder} holds {some(found)}, which looks like a split of a data set, and no "
            f"{wanted}/: rename the folders to train and val, so that no validation image is trained on."
        )
