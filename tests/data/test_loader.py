"""Transforms, and what becomes of a loader whose images or processes fail."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from qvit.cli.ending import ends_in_a_sentence
from qvit.data.loader import make_loader, make_transform, readable
from qvit.data.sources import open_data
from qvit.errors import CorruptImageError, DataError
from qvit.images import Picture, open_picture
from qvit.train.evaluate import evaluate

PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 224, 224],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
}
AUGMENTATIONS: list[dict[str, Any] | None] = [
    None,
    {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25},
    {"train_crop_mode": "rkrc"},
    {"train_crop_mode": "rkrr"},
    {"no_aug": True},
]


def _transform_in_little_memory(transforms: list[Callable[[Picture], Any]], size: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    for transform in transforms:
        transform(open_picture(Image.new("RGB", (300, 200))))
    picture = open_picture(Image.new("RGB", size))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 600_000_000, resource.RLIM_INFINITY))
    for transform in transforms:
        assert tuple(transform(picture).shape) == (3, 224, 224)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
@pytest.mark.parametrize("size", [(1, 60_000), (2_000_000, 2)])
def test_strips_take_no_more_memory_in_training(size: tuple[int, int]) -> None:
    # Resized until its shorter edge has 249 pixels, a strip of 1 x 60000 takes 10.8 GB.
    transforms = [make_transform(PREPROCESSING, augmentation) for augmentation in AUGMENTATIONS]
    process = multiprocessing.get_context("fork").Process(target=_transform_in_little_memory, args=(transforms, size))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("size", [(300, 200), (20, 600)])
def test_training_sees_the_whole_of_ordinary_images(size: tuple[int, int]) -> None:
    seen: list[tuple[int, int]] = []
    transform = make_transform(PREPROCESSING, {})
    transform.args[0].transforms.insert(0, lambda image: seen.append(image.size) or image)  # type: ignore[attr-defined]
    transform(open_picture(Image.new("RGB", size)))
    transform(open_picture(Image.new("RGB", (2, 1000))))
    assert seen == [size, (2, 2 * (2**24 // 224**2))]


class Killed(Dataset[Any]):
    """Images whose process is killed when the third one is asked for, as by a system out of memory."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return open_picture(Image.new("RGB", (8, 8))), 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_killed_worker_ends_in_a_sentence(shuffle: bool) -> None:
    others = multiprocessing.active_children()
    loader = make_loader(Killed(), make_transform(PREPROCESSING), 2, shuffle=shuffle, workers=2)
    with pytest.raises(DataError, match=r"^A process that decodes images has ended: .*--workers, and --resume"):
        list(readable(loader, skip_corrupt=True))
    # The others would wait for a lock that the killed one held, and the end of this process for them.
    assert not set(multiprocessing.active_children()) - set(others)


def test_other_errors_of_workers_are_not_taken_for_a_kill() -> None:
    class Failing(Killed):
        def __getitem__(self, index: int) -> Any:
            raise RuntimeError("something else")

    for workers in (0, 1):
        loader = make_loader(Failing(), make_transform(PREPROCESSING), 2, shuffle=False, workers=workers)
        with pytest.raises(RuntimeError, match="something else"):
            list(readable(loader, skip_corrupt=True))


def test_worker_killed_while_the_model_trains_ends_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    @ends_in_a_sentence
    def train() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")  # raised by a signal handler

    with pytest.raises(SystemExit) as ending:
        train()
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith("qvit: A process that decodes images has ended: ")


def test_unreadable_validation_images_have_no_accuracy(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    val = open_data(str(folder)).val
    loader = make_loader(val, make_transform(PREPROCESSING), 3, shuffle=False)
    with pytest.raises(CorruptImageError, match=r"No validation image can be read, .*val/b/2.png cannot"):
        evaluate(nn.Flatten(), loader, torch.device("cpu"), skip_corrupt=True)
