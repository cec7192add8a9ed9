"""Small models, the same on every run; a float ViT trained on the digits once for all tests; small image folders."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from rich.console import Console
from torch import nn

import jobs
import qvit
from members import CLASSES, vary
from node import Node, need_modules
from qvit.data.sources import ImageSets, open_data
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe
from qvit.train.evaluate import Accuracy
from qvit.train.methods import FloatModel, train_full_precision
from qvit.train.options import Options
from qvit.train.recipe import Recipe, load_recipe

# One thread per process: two workers run the tests, and processes of two threads each on two cores slow one another
# tenfold. What a test starts inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# In the background of a script Ctrl-C is ignored, here and in all that is started here, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FAST = ("format", "nn", "runtime", "serving")
"""Folders whose tests neither train nor start processes; with the tests beside this file they are the fast part."""
SLOW = ("test_hooks.py", "test_hub.py", "test_import.py", "test_readme.py", "test_recompute.py")
SLOW += ("test_faults.py", "test_workers.py", "test_programs.py", "test_image_memory.py")
SLOW += ("test_serving_process.py", "test_many_pictures.py", "test_examples.py")
"""Files of these that do, or that take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make test-fast`` leaves out, and let it run first: what ends last ends at once in every worker."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if item.path.name in SLOW or (folder not in FAST and folder != item.path.name):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


def make_vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    """Return a tiny float model in evaluation mode whose attention is not flat and whose biases are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **kwargs})
    return vary(model).eval()


def save_float(path: Path, model: nn.Module) -> Path:
    """Write a model like :func:`make_vit`'s as a float checkpoint."""
    arguments = {name: value for name, value in TINY.items() if name != "num_classes"}
    write_checkpoint(path, describe(MODEL, arguments, CLASSES, {}), model)
    return path


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name``, which ``make`` fills in the first worker that asks; the others wait and share it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the workers' own folders
    folder, made = root / name, root / f"{name}-made"
    with FileLock(root / f"{name}-lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker in which it failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a float checkpoint of :func:`make_vit`, with random weights."""
    return save_float(tmp_path_factory.mktemp("random") / "float.pt", make_vit())


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A process of Node with the engine of the browser."""
    need_modules()
    process = Node(tmp_path_factory.mktemp("node"))
    yield process
    process.close()


@pytest.fixture(autouse=True, scope="session")
def _quick_comparisons() -> Iterator[None]:
    """Let runtimes take turns without pauses, in processes that have PyTorch loaded when they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qvit.bench.compare.PAUSE", 0.0)
        patch.setattr("qvit.bench.compare._CONTEXT", jobs.CONTEXT)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vit() -> nn.Module:
    return make_vit()


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    return make_vit


@pytest.fixture(scope="session")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed file of :func:`make_vit`, 4 bits; classes are called ``class 0`` to ``class 9``."""
    model = qvit.quantize(make_vit(), qvit.QuantConfig(4))
    qvit.calibrate(model, [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))])
    path = tmp_path_factory.mktemp("packed") / "tiny.safetensors"
    preprocessing = {
        "input_size": [3, 16, 16],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    qvit.export(model, path, preprocessing=preprocessing, classes=[f"class {n}" for n in range(10)])
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(10, (16,), generator=torch.Generator().manual_seed(2))


MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


TEACHER = ["model_args.depth=2", "model_args.patch_size=4"]
"""Of the digits' recipe, what makes the architecture of :func:`teacher`."""


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    float_model = {"epochs": 8, "batch_size": 32, "lr": 4e-3, "warmup_epochs": 1}
    changes = [f"full_precision.{name}={value}" for name, value in float_model.items()]
    return load_recipe("digits", [*TEACHER, *changes, "quantized.epochs=2"])


@pytest.fixture(scope="session")
def digits() -> ImageSets:
    return open_data("digits", mode="L")


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, digits: ImageSets) -> Path:
    def train(out: Path) -> None:
        spec = describe(MODEL, recipe.model_args, digits.classes, recipe.preprocessing)
        train_full_precision(spec, digits, recipe, Options(out), Console(file=io.StringIO()))

    return made_once(tmp_path_factory, "float", train) / "best.pt"


@pytest.fixture
def teacher(teacher_file: Path) -> FloatModel:
    from qvit.models.checkpoint import load_checkpoint

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


TINY_RECIPE = """
model_args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 2, num_heads: 2}
preprocessing: {mean: [0.5], std: [0.5], crop_pct: 1.0, interpolation: bilinear}
augmentation: {scale: [0.9, 1.0], ratio: [1.0, 1.0], hflip: 0.0, color_jitter: null, interpolation: bilinear}
full_precision: {epochs: 3, batch_size: 64, lr: 4e-3, optimizer: adamw}
quantized: {epochs: 1, batch_size: 10, lr: 2e-3, optimizer_args: {eps: 1e-8}, calibration_images: 128, reconstruction_steps: 9}
"""  # noqa: E501
"""Of a model that trains on the digits in seconds, through the command line."""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_float(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A float model, made as a user makes one: by the command; its third epoch, the last one, is not the best."""
    from commands import run
    from qvit.train import loop

    evaluate, evaluations = loop.evaluate, itertools.count(1)

    def spoil_and_evaluate(model: nn.Module, *arguments: Any, **options: Any) -> Accuracy:
        if next(evaluations) == 3:
            nn.init.zeros_(model.head.weight)
        return evaluate(model, *arguments, **options)

    def train(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "evaluate", spoil_and_evaluate)
            done = run("train", MODEL, "--full-precision", "--data", "digits", "--recipe", tiny_recipe, "--out", out)
        assert done.status == 0, done.err
        (out / "said").write_text(done.out)

    return made_once(tmp_path_factory, "teacher", train) / "best.pt"


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six of each digit, half of them to validate with."""
    from sklearn.datasets import load_digits

    def write(folder: Path) -> None:
        images, labels = load_digits(return_X_y=True)
        for digit in range(10):
            for n, image in enumerate(images[labels == digit][:6]):
                path = folder / ("train", "val")[n % 2] / str(digit) / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 255 / 16).astype(np.uint8).reshape(8, 8)).save(path)

    return made_once(tmp_path_factory, "subset", write)


@pytest.fixture
def training(tiny_recipe: Path, digit_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a two-bit training; a later option of the same name wins."""
    arguments = ["train", MODEL, "--data", str(digit_folder), "--recipe", str(tiny_recipe), "--bits", "2"]
    return [*arguments, "--out", str(tmp_path / "run")]
