"""Two models side by side: their classes on the same images, their size and their speed."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qvit.analysis.paired import Paired, compare_classes
from qvit.analysis.size import model_size
from qvit.bench.compare import ROUNDS, interleaved, time_once
from qvit.bench.peers import Images, Runner
from qvit.config import bits_text, check_count
from qvit.data.loader import Batch, make_loader, make_transform, readable
from qvit.data.pictures import all_pictures
from qvit.data.sources import check_classes, open_validation
from qvit.data.splits import SPLITS
from qvit.errors import ConfigError
from qvit.exporting.packed import export
from qvit.files import printable
from qvit.images import Mode, Picture
from qvit.models.packed_model import PackedClassifier, load_model
from qvit.models.spec import ModelSpec
from qvit.runtime.engine import load
from qvit.train.display import progress_bar
from qvit.train.options import Options, make_accelerator


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be compared, and on what.

    Args:
        first: a checkpoint or a packed file.
        second: another one.
        data: labelled images, as :func:`qvit.data.sources.open_validation` takes them; ``None`` if there are pictures.
        pictures: folder of pictures without labels; ``None`` if there are data.
        root: folder of a timm data set.
        splits: of the data.
        batch_size: images per step.
        threads: of either model while it is timed.
    """

    first: Path
    second: Path
    data: str | None = None
    pictures: Path | None = None
    root: str | None = None
    splits: str = SPLITS
    batch_size: int = 64
    threads: int = 1

    def __post_init__(self) -> None:
        if (self.data is None) == (self.pictures is None):
            raise ConfigError("Give either --data, images in folders of classes, or --images, pictures without labels.")
        check_count("batch_size", self.batch_size)
        check_count("threads", self.threads)


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two models, as it is compared.

    Args:
        path: of its file.
        model: the model of a checkpoint, or the engine of a packed file.
        spec: what it is.
    """

    path: Path
    model: nn.Module
    spec: ModelSpec

    @property
    def bits(self) -> str:
        """Bits of weights and activations; of a packed file those that most layers have."""
        config = self.spec.quant_config
        if config is None:
            return "32 (float)"
        return bits_text((config["weight_bits"], config["activation_bits"]), config.get("overrides", ()))

    @property
    def timed_in(self) -> str:
        """What runs it while it is timed; a quantized checkpoint becomes a packed file for that."""
        return "PyTorch, float32" if self.spec.quant_config is None else "engine"

    @functools.cached_property
    def size(self) -> int:
        """Bytes: of a packed file its own, of a checkpoint those of its model (docs/method.md, section 6)."""
        packed = isinstance(self.model, PackedClassifier)
        return self.path.stat().st_size if packed else model_size(self.model).total


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`run_comparison` found.

    Args:
        sides: both models.
        source: where the images are, for people.
        images: the images themselves.
        paired: the models' classes.
        seconds: of one image, the median of either model.
        threads: of either model while it was timed.
    """

    sides: tuple[Side, Side]
    source: str
    images: Dataset[Any]
    paired: Paired
    seconds: tuple[float, float]
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        paired = self.paired
        return {
            "models": [
                {"file": str(side.path), "name": side.spec.name, "bits": side.bits, "bytes": side.size, "seconds": s}
                for side, s in zip(self.sides, self.seconds, strict=True)
            ],
            "threads": self.threads,
            "source": self.source,
            "images": paired.images,
            "unreadable": paired.unreadable,
            "same": paired.same,
            "right": None if paired.right is None else paired.right._asdict(),
            "agreement": paired.agreement._asdict(),
            "top1": None if paired.top1 is None else [top1._asdict() for top1 in paired.top1],
            "gain": None if paired.gain is None else paired.gain._asdict(),
            "p_value": paired.p_value,
        }


def run_comparison(request: Request, options: Options, console: Console) -> Comparison:
    """Compare two models, and show how far it is.

    Raises:
        ConfigError: if a model has no classes.
        DataError: if the models' classes are not the same, or not those of the images.
        CorruptImageError: naming the first image that cannot be read, unless ``options.skip_corrupt``.
        QvitError: as :func:`qvit.models.packed_model.load_model`.
    """
    first, second = (Side(path, *load_model(path)) for path in (request.first, request.second))
    for side in (first, second):
        if not side.spec.classes:
            raise ConfigError(f"{side.path} holds a feature extractor, which has no classes to compare.")
    check_classes(str(first.path), first.spec.classes, str(second.path), second.spec.classes)
    source, images = _open(request, first.spec, console)
    device = make_accelerator(options).device
    loaders = [
        make_loader(
            images,
            functools.partial(_prepared, spec.mode, make_transform(spec.preprocessing)),
            request.batch_size,
            shuffle=False,
            workers=options.workers,
            device=device,
        )
        for spec in _different(first.spec, second.spec)
    ]
    with progress_bar(console) as bar:
        paired = compare_classes(
            first.model.to(device),
            second.model.to(device),
            bar.track(_pairs(loaders, options.skip_corrupt), len(loaders[0]), description="images"),
            device,
            labelled=request.data is not None,
        )
    return Comparison(
        (first, second), source, images, paired, _latency((first, second), request.threads), request.threads
    )


def _open(request: Request, spec: ModelSpec, console: Console) -> tuple[str, Dataset[Any]]:
    """Return what the images are called, and the images."""
    if request.data is not None:
        images = open_validation(request.data, spec.classes, mode=spec.mode, root=request.root, splits=request.splits)
        return request.data, images
    assert request.pictures is not None
    images, remark = all_pictures(request.pictures, spec.mode)
    if remark:
        console.print(printable(remark), soft_wrap=True)
    return str(request.pictures), images


def _different(first: ModelSpec, second: ModelSpec) -> list[ModelSpec]:
    """Return the specs whose preprocessing differs: images are decoded once for both models where it does not."""
    return [first] if first.preprocessing == second.preprocessing else [first, second]


def _prepared(mode: Mode, transform: Any, picture: Picture) -> Tensor:
    """Return an image that was opened for one model as the other may take it."""
    tensor: Tensor = transform(dataclasses.replace(picture, mode=mode))
    return tensor


def _pairs(loaders: list[DataLoader[Batch]], skip_corrupt: bool) -> Iterator[tuple[Batch, Batch]]:
    """Yield every batch as the first and as the second model take it."""
    for batches in zip(*(readable(loader, skip_corrupt=skip_corrupt) for loader in loaders), strict=True):
        yield batches[0], batches[-1]


def _latency(sides: tuple[Side, Side], threads: int) -> tuple[float, float]:
    """Return the median seconds of one image, the two models by turns.

    A quantized checkpoint is timed as the packed file that it becomes, in the engine; a float one in PyTorch.
    """
    with tempfile.TemporaryDirectory(prefix="qvit-compare-") as folder, _torch_threads(threads):
        runners = [_runner(side, Path(folder) / f"{n}.safetensors", threads) for n, side in enumerate(sides)]
        timers = {
            str(n): functools.partial(time_once, runner, _noise(side.spec))
            for n, (runner, side) in enumerate(zip(runners, sides, strict=True))
        }
        first, second = map(statistics.median, interleaved(timers, ROUNDS).values())
    return first, second


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _runner(side: Side, file: Path, threads: int) -> Runner:
    """Return what runs a model; a packed file that has to be made is ``file``."""
    if side.spec.quant_config is None:
        return functools.partial(_run_float, side.model.cpu())
    if isinstance(side.model, PackedClassifier):
        return load(side.path, threads=threads)
    export(side.model, file, preprocessing=side.spec.preprocessing, classes=side.spec.classes)
    return load(file, threads=threads)


@torch.inference_mode()
def _run_float(model: nn.Module, images: Images) -> Images:
    logits: Images = model(torch.from_numpy(images)).numpy()
    return logits


def _noise(spec: ModelSpec) -> Images:
    return np.random.default_rng(0).standard_normal((1, *spec.preprocessing["input_size"]), np.float32)
