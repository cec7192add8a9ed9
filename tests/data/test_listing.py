"""What of a folder is taken, left out and said, or refused."""

from __future__ import annotations

import os
import string
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from commands import run, sentence
from qvit.data.datasets import Images
from qvit.data.listing import Visited, list_folder, natural_key
from qvit.data.sources import open_data, open_validation
from qvit.errors import DataError
from qvit.images import suffixes

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a maker of files: images where the suffix says so, else of three letters."""

    def make(*names: str, root: str = "data") -> Path:
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in suffixes():
                Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(path, "PNG")
            else:
                path.write_text("txt")
        return tmp_path / root

    return make


def two_each(splits: Sequence[str], classes: Sequence[str] = ("a", "b")) -> list[str]:
    return [f"{split}/{name}/{n}.png" for split in splits for name in classes for n in range(2)]


def counts(folder: Path) -> tuple[int, int]:
    sets = open_data(str(folder))
    return len(sets.train), len(sets.val)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", sorted(suffixes()))
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_every_suffix_that_the_decoder_reads_is_taken(make: Make, suffix: str, case: Callable[[str], str]) -> None:
    folder = make(*(f"{split}/{name}/x{case(suffix)}" for split in ("train", "val") for name in "ab"))
    assert counts(folder) == (2, 2)


LITTER = ("._0.png", ".hidden.jpg", ".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", "@eaDir/0.png", "Thumbs.db")


def test_litter_is_no_image_and_no_class_and_is_said_once(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    litter = [f"train/{place}{name}" for place in ("", "a/") for name in LITTER]
    folder = make(*two_each(("train", "val")), *litter, "train/a/notes.txt", "train/b/README")
    sets = open_data(str(folder))
    assert sets.classes == ["a", "b"]
    assert len(sets.train) == 4  # type: ignore[arg-type]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"qvit: {folder / 'train'}: left out 10 hidden files and litter, 2 .db files, 1 .txt files, "
        "1 files without a suffix."
    ]


def test_nothing_is_said_where_nothing_is_left_out(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    open_data(str(make(*two_each(("train", "val")))))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
@pytest.mark.parametrize("val", ["val", "Val", "VALIDATION", "Valid", "test", "Test"])
def test_splits_are_found_in_any_case(make: Make, train: str, val: str) -> None:
    folder = make(*two_each((train,)), f"{val}/a/0.png", f"{val}/b/0.png")
    assert counts(folder) == (4, 2)
    assert len(open_validation(str(folder), ["a", "b"])) == 2  # type: ignore[arg-type]


def test_splits_may_be_named(make: Make) -> None:
    folder = make(*two_each(("train", "val", "test")), "Test/a/2.png", "noval/a/0.png", "noval/b/0.png")
    (folder / "Test").rename(folder / "Test2")
    sets = open_data(str(folder), splits="train,noval")
    assert len(sets.val) == 2  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no folder dev"):
        open_data(str(folder), splits="train,dev")
    for splits in ("train", "train,train", "train,val,test", ","):
        with pytest.raises(DataError, match="two different names"):
            open_data(str(folder), splits=splits)


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        (["Val", "Test"], "Test, Val"),
        (["training_set", "test_set"], "test_set, training_set"),
        (["train2017", "val2017"], "train2017, val2017"),
        (["Training", "holdout"], "Training, holdout"),
        (["val"], "val"),
        (["cats", "dogs", "validation-images"], "validation-images"),
        (["train"], "train/ and no val/"),
        (["train", "Train", "val"], "Train and train"),
        (["train", "val", "Val"], "Val and val"),
    ],
)
def test_what_looks_like_splits_is_never_one_data_set(make: Make, splits: list[str], named: str) -> None:
    with pytest.raises(DataError, match=named):
        open_data(str(make(*two_each(splits))))


@pytest.mark.parametrize("name", ["train/a/0.png", "imagenet/val/a/0.png", "cats/Test/0.png"])
def test_a_split_inside_a_class_folder_is_refused(make: Make, name: str) -> None:
    # A folder of data sets, or one folder too many, as unpacking an archive leaves it.
    folder = make(*two_each((".",)), f"a/{name}")
    with pytest.raises(DataError, match="looks like a split of a data set and not like a class"):
        open_data(str(folder))


def test_a_class_may_be_called_train(make: Make) -> None:
    folder = make(*two_each(("train", "val"), ("bus", "train")))
    assert open_data(str(folder)).classes == ["bus", "train"]
    for source in (folder, folder / "val"):
        assert len(open_validation(str(source), ["bus", "train"])) == 4  # type: ignore[arg-type]


def test_validation_of_training_images_alone_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="holds train, which looks like a split"):
        open_validation(str(make(*two_each(("train",)))), ["a", "b"])


@pytest.mark.parametrize("split", ["train", "val", "."])
def test_stray_pictures_are_refused(make: Make, split: str) -> None:
    splits = ("train", "val") if split != "." else (".",)
    folder = make(*two_each(splits), f"{split}/stray.webp", f"{split}/z.png")
    with pytest.raises(DataError, match=r"stray.webp is an image outside the class folders \(2 such\)"):
        open_data(str(folder))


def test_a_class_folder_without_images_is_refused(make: Make) -> None:
    folder = make(*two_each(("train", "val")), "train/c/readme.txt")
    with pytest.raises(DataError, match=r"train/c holds no images \(\.jpg"):
        open_data(str(folder))


@pytest.mark.parametrize("place", ["train/b", "train/b/inside", "train", "val", "."])
def test_a_folder_that_cannot_be_read_is_named(make: Make, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(*two_each(("train", "val")), "train/b/inside/0.png")
    scandir = os.scandir

    def closed(path: str) -> object:  # root may read every folder, so the mode of one would not do
        if Path(path) == folder / place:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=rf"{folder / place} cannot be read \(Permission denied\)"):
        open_data(str(folder))


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/a/loop", ".."),
        ("train/a/loop", "."),
        ("train/a/loop", "../.."),
        ("train/a/loop", "/"),
        ("train/a/self", "self"),
        ("train/c", "a"),
        ("train/0", "../val"),
        ("val/c", "../train/a"),
        ("train/a/other", "../b"),
    ],
)
def test_links_to_what_is_there_already_are_refused(make: Make, link: str, target: str) -> None:
    folder = make(*two_each(("train", "val")))
    (folder / link).symlink_to(target)
    with pytest.raises(DataError, match="leads to .* again|cannot be read|looks like a split"):
        open_data(str(folder))


def test_a_link_of_one_split_to_the_other_is_refused(make: Make) -> None:
    folder = make(*two_each(("train",)))
    (folder / "val").symlink_to("train")
    with pytest.raises(DataError, match="val leads to .*train again"):
        open_data(str(folder))


def test_links_to_elsewhere_are_followed(make: Make) -> None:
    other = make("cats/0.png", "cats/1.png", "dog.png", root="other")
    folder = make(*two_each(("train",), ("b",)), *two_each(("val",)))
    (folder / "train" / "a").symlink_to(other / "cats")
    (folder / "train" / "b" / "2.png").symlink_to(other / "dog.png")
    (folder / "train" / "b" / "3.png").symlink_to("nowhere")
    sets = open_data(str(folder))
    assert len(sets.train) == 6  # type: ignore[arg-type]
    assert "3.png" in sets.train[5].message  # the broken link is named where it is used


def test_pipes_are_left_out(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(*two_each(("train", "val")))
    os.mkfifo(folder / "train" / "a" / "pipe.png")
    assert counts(folder) == (4, 4)
    assert "1 devices and pipes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (("a",), r"{val} has no folder b: its 1 classes must be the 2 of {train}\."),
        (("a", "B"), r"{val} has no folder b, but B: its 2 classes must be the 2 of {train}\."),
        (("a", "b", "c"), r"{val} has a folder c: its 3 classes must be the 2 of {train}\."),
        (("c", "d"), r"{val} has no folder a, b, but c, d: its 2 classes must be the 2 of {train}\."),
    ],
)
def test_other_classes_in_val_are_refused_by_name(make: Make, classes: tuple[str, ...], reason: str) -> None:
    folder = make(*two_each(("Train",)), *two_each(("VAL",), classes))
    with pytest.raises(DataError, match=reason.format(val=folder / "VAL", train=folder / "Train")):
        open_data(str(folder))
    with pytest.raises(DataError, match=reason.format(val=folder / "VAL", train="the checkpoint")):
        open_validation(str(folder), ["a", "b"])


def test_classes_of_a_checkpoint_are_found_by_name_in_any_order(make: Make) -> None:
    folder = make(*two_each((".",)))
    images = open_validation(str(folder), ["b", "a"])
    assert isinstance(images, Images)
    assert images.labels == [1, 1, 0, 0]


def test_one_image_of_a_class_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="one image only of class b, and some of each class are held out"):
        open_data(str(make("a/0.png", "a/1.png", "b/0.png")))


def test_images_in_folders_of_a_class_are_of_the_class(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    # As Tiny ImageNet has them.
    folder = make(
        "train/n1/images/0.png", "train/n1/n1_boxes.txt", "train/n2/images/0.png", "val/n1/0.png", "val/n2/0.png"
    )
    sets = open_data(str(folder))
    assert sets.classes == ["n1", "n2"]
    assert sets.train.labels == [0, 1]  # type: ignore[attr-defined]
    assert "2 images lie in folders inside the class folders" in capsys.readouterr().err


def test_shards_and_class_folders_in_one_folder_are_refused(make: Make) -> None:
    with pytest.raises(DataError, match="has shards .* and class folders"):
        open_data(str(make("a/0.png", "b/0.png", "x.tar")))


def test_torchvision_folders_are_listed_alike(make: Make) -> None:
    folder = make(*two_each(("Train", "Val")), "Train/a/._0.png")
    sets = open_data("torch/image_folder", root=str(folder))
    assert len(sets.train) == 4  # type: ignore[arg-type]
    with pytest.raises(DataError, match="give --data-root"):
        open_data("torch/image_folder")


NAMES = st.text(string.ascii_letters + string.digits + "_- ü", min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=30, deadline=None)
@given(tree=st.dictionaries(NAMES, st.sets(NAMES, min_size=1, max_size=4), min_size=1, max_size=5))
def test_classes_and_images_have_timms_order(tree: dict[str, set[str]]) -> None:
    """What was trained before must go on: the order of the data is part of a run."""
    with tempfile.TemporaryDirectory() as temporary:
        lowered = {name.lower(): files for name, files in tree.items()}
        for name, files in lowered.items():
            (Path(temporary) / name).mkdir()
            for file in {file.lower() for file in files}:
                (Path(temporary) / name / f"{file}.png").touch()
        listing = list_folder(Path(temporary), Visited())
        found, numbers = find_images_and_targets(temporary)
        keys = [natural_key(name) for name in listing.classes]
        assert keys == sorted(keys)
        if len({str(key) for key in keys}) == len(keys):  # timm leaves "1" and "01" in the order of a set
            assert listing.classes == sorted(numbers, key=lambda name: numbers[name])
        paths, labels = listing.samples(listing.classes)
        assert [natural_key(path) for path in paths] == [natural_key(path) for path, _ in found]
        assert [Path(path).parent.name for path in paths] == [listing.classes[label] for label in labels]


def test_names_of_other_digits_are_sorted() -> None:
    assert sorted(["m²", "m10", "m٩", "m1"], key=natural_key) == ["m1", "m٩", "m10", "m²"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a/0.png", "b/0.png"], "one image only of class a"),
        (two_each(("Training", "holdout")), "which looks like a split"),
        (two_each(("train", "val"), ("a",)), "one class only"),
    ],
)
def test_training_on_what_is_wrong_ends_in_a_sentence(
    make: Make, names: list[str], reason: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = run("train", "vit_tiny_patch16_224", "--full-precision", "--data", make(*names), "--out", out, "--cpu")
    assert reason in sentence(done)
    assert not (out / "last.pt").exists()
