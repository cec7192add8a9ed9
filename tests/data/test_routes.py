"""An image has the same pixels on whatever route it comes into a model."""

from __future__ import annotations

import array
import io
import mmap
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from hypothesis import given, settings
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset

from pictures import File, expected, files
from qvit.data.datasets import LibraryImages, Unreadable
from qvit.data.loader import make_loader, make_transform, readable
from qvit.data.resident import decode_once
from qvit.data.sources import open_data, open_validation
from qvit.errors import CorruptImageError, DataError
from qvit.images import Mode, open_picture
from qvit.runtime.preprocess import fit, preprocess

SIZE = 16


def preprocessing(mode: Mode) -> dict[str, Any]:
    channels = 3 if mode == "RGB" else 1
    statistics = {"mean": [0.5, 0.4, 0.3][:channels], "std": [0.2, 0.3, 0.4][:channels]}
    size = {"input_size": [channels, SIZE, SIZE], "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    return {**size, **statistics}


class Reader:
    """Hands out open files, as timm's reader of Hugging Face data sets does."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self.content), 0


class Opening(Dataset[Any]):
    """Opens files with Pillow itself and leaves them as they are, as torchvision's INaturalist does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.path), 0


def folder_of(root: Path, file: File) -> Path:
    """Write a data set whose images are all the same one."""
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (root / place).mkdir(parents=True)
        (root / place / f"x{file.suffix}").write_bytes(file.content)
    return root


def shard_of(root: Path, file: File) -> Path:
    root.mkdir()
    with tarfile.open(root / "val.tar", "w") as tar:
        for name, content in ((f"x{file.suffix}", file.content), ("x.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.parametrize("mode", ["RGB", "L"])
@settings(max_examples=60, deadline=None)
@given(file=files())
def test_all_routes_give_the_same_pixels(mode: Mode, file: File) -> None:
    wanted = np.asarray(expected(Image.open(io.BytesIO(file.content)), mode))

    def check(item: Any) -> None:
        assert not isinstance(item, Unreadable)
        np.testing.assert_array_equal(np.asarray(item[0].whole()), wanted)

    with tempfile.TemporaryDirectory() as temporary:
        folder = folder_of(Path(temporary) / "images", file)
        shards = shard_of(Path(temporary) / "shards", file)
        path = folder / "val" / "a" / f"x{file.suffix}"
        loaded = Image.open(io.BytesIO(file.content))
        loaded.load()
        buffers = [bytearray(file.content), memoryview(file.content), array.array("B", file.content)]
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            sources = [path, file.content, io.BytesIO(file.content), opened, Image.open(path), loaded, wanted]
            sources += [*buffers, mapped, mapped]
            # What predict sees and what training, evaluation and --decode-once do.
            inputs = [preprocess(source, preprocessing(mode)) for source in sources]
        sets = open_data(str(folder), mode=mode)
        check(sets.val[0])
        check(open_validation(str(shards), ["0", "1"], mode=mode)[0])
        torch_folder = torchvision.datasets.DatasetFolder(folder / "val", _refuse, extensions=(file.suffix.lower(),))
        for dataset in (torch_folder, Opening(path), timm.data.ImageDataset(None, reader=Reader(file.content))):
            check(LibraryImages(dataset, "torch/test", mode)[0])

        transform = make_transform(preprocessing(mode))
        for batch in readable(make_loader(sets.val, transform, 2, shuffle=False), skip_corrupt=False):
            inputs += [image.numpy() for image in batch.images]
        for image in inputs:
            np.testing.assert_array_equal(image.view(np.uint32), inputs[0].view(np.uint32))
        fitted: NDArray[np.uint8] = fit(path, preprocessing(mode))
        decoded = decode_once(sets, preprocessing(mode), Console(quiet=True)).val
        np.testing.assert_array_equal(decoded[0][0].numpy(), fitted)


def _refuse(path: str) -> Any:
    pytest.fail("torchvision decoded the image itself")


@pytest.fixture
def broken() -> File:
    return File(b"\x89PNG broken", ".png")


def stub_timm(monkeypatch: pytest.MonkeyPatch, *datasets: Dataset[Any]) -> None:
    for dataset in datasets:
        dataset.classes = ["a", "b"]  # type: ignore[attr-defined]
    made = iter(datasets)
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_args, **_options: next(made))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_of_libraries_are_named_or_skipped(
    tmp_path: Path, broken: File, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    folder = folder_of(tmp_path, broken)
    for name, dataset, named in (
        ("torch/some", torchvision.datasets.ImageFolder(folder / "val"), "val/a/x.png cannot"),
        ("torch/other", Opening(folder / "val" / "a" / "x.png"), r"torch/other \(image 0\) cannot"),
        ("hfds/some", timm.data.ImageDataset(None, reader=Reader(broken.content)), r"hfds/some \(image 0\) cannot"),
    ):
        stub_timm(monkeypatch, Opening(folder), dataset)
        loader = make_loader(
            open_data(name).val, make_transform(preprocessing("RGB")), 2, shuffle=False, workers=workers
        )
        with pytest.raises(CorruptImageError, match=f"{named} .*--skip-corrupt"):
            list(readable(loader, skip_corrupt=False))
        (batch,) = readable(loader, skip_corrupt=True)
        assert len(batch.labels) == 0
        assert len(batch.unreadable) >= 1


def test_images_without_labels_are_refused_when_they_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlabelled(Opening):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0], -1

    path = Path(__file__)
    monkeypatch.setattr(Image, "open", lambda *_args: Image.new("L", (1, 1)))
    for datasets in ((Unlabelled(path), Opening(path)), (Opening(path), Unlabelled(path))):
        stub_timm(monkeypatch, *datasets)
        with pytest.raises(DataError, match=r"torch/some .*label -1"):
            open_data("torch/some")


def test_splits_of_a_library_with_other_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_timm(monkeypatch, Opening(Path()), Opening(Path()))
    names = iter([["a", "b"], ["a", "c"]])
    monkeypatch.setattr("qvit.data.sources._class_names", lambda _dataset: next(names))
    with pytest.raises(DataError, match="Class 1 is 'b' in the training split"):
        open_data("torch/some")


def test_training_and_evaluation_transforms_of_a_whole_image_agree() -> None:
    picture = open_picture(Image.new("RGB", (SIZE, SIZE), (1, 2, 3)))
    augmented = make_transform(
        preprocessing("RGB"), {"scale": [1, 1], "ratio": [1, 1], "hflip": 0.0, "color_jitter": None}
    )
    whole = make_transform({**preprocessing("RGB"), "crop_pct": 1.0})
    assert torch.equal(augmented(picture), whole(picture))
