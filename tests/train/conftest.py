"""A float ViT trained on the digits for some seconds, once for all tests, and small image folders."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from qvit.train.checkpoint import describe
from qvit.train.data import ImageSets, open_data
from qvit.train.loop import Options
from qvit.train.methods import FloatModel, train_full_precision
from qvit.train.recipe import Recipe, load_recipe

MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load_recipe("digits", ["full_precision.epochs=25", "full_precision.lr=4e-3", "quantized.epochs=2"])


@pytest.fixture(scope="session")
def digits() -> ImageSets:
    return open_data("digits", mode="L")


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, digits: ImageSets) -> Path:
    out = tmp_path_factory.mktemp("float")
    card = describe(MODEL, recipe.model_args, digits.classes, recipe.preprocessing)
    train_full_precision(card, digits, recipe, Options(out), Console(file=io.StringIO()))
    return out / "best.pt"


@pytest.fixture
def teacher(teacher_file: Path) -> FloatModel:
    from qvit.train.checkpoint import load_checkpoint

    return FloatModel(*load_checkpoint(teacher_file))


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of ``root/split/class/n.png`` trees of 8 x 8 images that differ by class."""

    def make(root: str = "images", splits: dict[str, int] | None = None, classes: tuple[str, ...] = ("a", "b")) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (splits or {"train": 8, "val": 4}).items():
            for index, name in enumerate(classes):
                folder = tmp_path / root / split / name
                folder.mkdir(parents=True)
                for n in range(count):
                    pixels = rng.integers(60 * index, 60 * index + 60, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{n}.png")
        return tmp_path / root

    return make
