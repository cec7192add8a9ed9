"""Pictures without labels: all of a folder at any depth, those held out apart, and what is left out is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from qvit.data.pictures import open_pictures
from qvit.errors import DataError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def folder_of(tmp_path: Path, count: int) -> Path:
    for number in range(count):
        picture(tmp_path / f"{'ab/' * (number % 3)}{number}.png")
    return tmp_path


def names(images: object) -> set[str]:
    return {os.path.basename(source) for source in images.sources}  # type: ignore[attr-defined]


def test_pictures_of_any_depth_are_taken_and_some_are_held_out(tmp_path: Path) -> None:
    chosen = open_pictures(folder_of(tmp_path, 20), "RGB", count=100, held_out=100)
    assert names(chosen.used) | names(chosen.held_out) == {f"{number}.png" for number in range(20)}
    assert not names(chosen.used) & names(chosen.held_out)
    assert len(chosen.held_out) == 4  # a fifth
    assert chosen.remark == ""
    image, label = chosen.used[0]
    assert (image.width, image.height, label) == (4, 4, 0)


def test_the_choice_is_that_of_the_seed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 30)
    first, again, other = (open_pictures(folder, "L", count=5, held_out=3, seed=seed) for seed in (1, 1, 2))
    assert first.used.sources == again.used.sources
    assert first.held_out.sources == again.held_out.sources
    assert first.used.sources != other.used.sources
    assert (len(first.used), len(first.held_out)) == (5, 3)


def test_one_picture_is_worked_with_and_measured_on(tmp_path: Path) -> None:
    chosen = open_pictures(folder_of(tmp_path, 1), "RGB", count=9, held_out=9)
    assert chosen.used.sources == chosen.held_out.sources
    assert len(chosen.used) == 1


def test_two_pictures_are_one_of_each(tmp_path: Path) -> None:
    chosen = open_pictures(folder_of(tmp_path, 2), "RGB", count=9, held_out=9)
    assert len(chosen.used) == len(chosen.held_out) == 1
    assert chosen.used.sources != chosen.held_out.sources


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    (folder / "notes.txt").write_text("x")
    picture(folder / ".hidden" / "x.png")
    chosen = open_pictures(folder, "RGB", count=9, held_out=9)
    assert len(chosen.used) + len(chosen.held_out) == 3
    assert "1 hidden files and litter" in chosen.remark
    assert "1 .txt files" in chosen.remark


@pytest.mark.parametrize("splits", [("train", "val"), ("test", "a")])
def test_folders_called_like_splits_are_folders(tmp_path: Path, splits: tuple[str, str]) -> None:
    for name in splits:
        picture(tmp_path / name / f"{name}.png")
    chosen = open_pictures(tmp_path, "RGB", count=9, held_out=9)
    assert names(chosen.used) | names(chosen.held_out) == {f"{name}.png" for name in splits}


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder .*/none: --images takes a folder"):
        open_pictures(tmp_path / "none", "RGB", count=9, held_out=9)
    with pytest.raises(DataError, match="There is no folder"):
        open_pictures(picture(tmp_path / "x" / "one.png"), "RGB", count=9, held_out=9)
    (tmp_path / "y" / "z").mkdir(parents=True)
    with pytest.raises(DataError, match="y holds no pictures .*, nor do the folders in it"):
        open_pictures(tmp_path / "y", "RGB", count=9, held_out=9)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this system has no links")
def test_a_link_back_is_refused_and_no_picture_counts_twice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    (folder / "again").symlink_to(folder)
    with pytest.raises(DataError, match="by a link: its images would count twice"):
        open_pictures(folder, "RGB", count=9, held_out=9)
