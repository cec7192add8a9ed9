"""Images decoded once, kept as bytes on the training device, and augmented there a batch at a time.

Decoding an image takes longer than a small model's step on it; here every image is decoded before the first step. Order
and randomness are those of :mod:`qvit.data.order`: an image's crop follows from its sample's seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset

from qvit.data.loader import Batch, make_loader, make_transform, readable
from qvit.data.order import EvaluationOrder, Sample, TrainOrder
from qvit.data.sources import ImageSets
from qvit.errors import ConfigError, CorruptImageError
from qvit.files import printable

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Area of a crop as a fraction of the image's, and its width over its height: timm's defaults."""
_TRIES = 10
"""Crops that are drawn for an image until one fits in it, as in torchvision."""
_NOTHING = (None, 0, 0.0, "")


class ResidentImages(Dataset[tuple[Tensor, int]]):
    """Decoded images.

    Args:
        pixels: ``(N, C, H, W)`` uint8, at the size of the model's input.
        labels: ``(N,)`` int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


def decode_once(
    sets: ImageSets, preprocessing: Mapping[str, Any], console: Console, *, workers: int = 0, skip_corrupt: bool = False
) -> ImageSets:
    """Return the images of ``sets`` decoded, resized and cropped as for evaluation.

    Args:
        sets: from :func:`qvit.data.sources.open_data`.
        preprocessing: of the model, as a checkpoint holds it.
        console: where progress is shown.
        workers: processes that decode.
        skip_corrupt: leave out images that cannot be read, and say how many.

    Raises:
        CorruptImageError: naming the first image that cannot be read, unless ``skip_corrupt``.
        ConfigError: if memory is not enough.
    """
    train, val = (
        _decode(images, name, preprocessing, console, workers, skip_corrupt)
        for images, name in ((sets.train, "training images"), (sets.val, "validation images"))
    )
    return ImageSets(train, val, sets.classes)


class ResidentLoader:
    """Batches of :class:`ResidentImages` on a device, normalized, and augmented if this is training.

    Args:
        images: what to load.
        order: which images a batch holds.
        preprocessing: mean and std.
        augmentation: of a recipe, for training: ``scale``, ``ratio``, ``hflip``, ``vflip`` and ``interpolation`` of
            :func:`timm.data.create_transform`; ``None`` for none.
        device: where the images are kept.

    Raises:
        ConfigError: if the augmentation asks for something else.
    """

    def __init__(
        self,
        images: ResidentImages,
        order: TrainOrder | EvaluationOrder,
        preprocessing: Mapping[str, Any],
        augmentation: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.batch_sampler = order
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.augmentation = None if augmentation is None else _supported(augmentation)
        statistics = torch.tensor([preprocessing["mean"], preprocessing["std"]], device=device)[:, :, None, None]
        self.mean, self.std = 255 * statistics

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for samples in self.batch_sampler:
            chosen = torch.tensor([sample.image for sample in samples], device=self.pixels.device)
            images = self.pixels[chosen].float()
            if self.augmentation is not None:
                images = crop_and_flip(images, samples, **self.augmentation)
            yield Batch((images - self.mean) / self.std, self.labels[chosen], [], [sample.image for sample in samples])


def crop_and_flip(
    images: Tensor,
    samples: Sequence[Sample],
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    hflip: float = 0.5,
    vflip: float = 0.0,
    interpolation: str = "bilinear",
) -> Tensor:
    """Return a random crop of every image, resized to the whole image, and perhaps flipped.

    A crop's area is uniform in ``scale``, the logarithm of its width over its height in ``ratio``, and its place in the
    image (Szegedy et al., 2015). Crops lie on whole pixels.

    Args:
        images: ``(B, C, H, W)`` float, 0..255.
        samples: whose seeds are drawn from, one per image.
        scale: smallest and largest area, as a fraction of the image's.
        ratio: smallest and largest width over height.
        hflip: probability of a mirror image.
        vflip: probability of an image upside down.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """
    height, width = images.shape[-2:]
    drawn = uniform(np.array([sample.seed for sample in samples], np.uint64), 2 * _TRIES + 4)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * drawn[:, :_TRIES])
    low, high = map(math.log, ratio)
    shape = np.exp(low + (high - low) * drawn[:, _TRIES : 2 * _TRIES])
    widths, heights = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    row, first = np.arange(len(samples)), fits.argmax(axis=1)
    # Where no try fits, the whole image.
    w = np.where(fits.any(axis=1), widths[row, first], width)
    h = np.where(fits.any(axis=1), heights[row, first], height)
    left, top, mirror, upside_down = drawn[:, -4:].T
    left, top = np.floor(left * (width - w + 1)), np.floor(top * (height - h + 1))

    # The crop as an affine map from [-1, 1] x [-1, 1], the output, into the input's coordinates of the same range.
    theta = np.zeros((len(samples), 2, 3), np.float32)
    theta[:, 0, 0] = np.where(mirror < hflip, -w, w) / width
    theta[:, 1, 1] = np.where(upside_down < vflip, -h, h) / height
    theta[:, 0, 2] = (2 * left + w) / width - 1
    theta[:, 1, 2] = (2 * top + h) / height - 1
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, grid, mode=interpolation, padding_mode="border", align_corners=False)
    return cropped.clamp(0, 255)  # bicubic interpolation overshoots


def uniform(seeds: NDArray[np.uint64], draws: int) -> NDArray[np.float64]:
    """Return ``draws`` numbers in [0, 1) for every seed, ``(len(seeds), draws)``: SplitMix64 (Steele et al., 2014).

    A generator per image would be seeded some hundred times per batch; this one needs no state.
    """
    # One step's outputs are the next one's states: neighbouring seeds would otherwise share numbers.
    state = _mix(seeds)[:, None] + np.arange(draws, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def _decode(
    images: Dataset[Any],
    name: str,
    preprocessing: Mapping[str, Any],
    console: Console,
    workers: int,
    skip_corrupt: bool,
) -> ResidentImages:
    count: int = len(images)  # type: ignore[arg-type]
    shape = (count, *preprocessing["input_size"])
    needed, free = math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"{count} {name} of {' x '.join(map(str, shape[1:]))} bytes need "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free: leave out --decode-once."
        )
    pixels, labels = torch.empty(shape, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    loader = make_loader(images, make_transform(preprocessing, normalize=False), 256, shuffle=False, workers=workers)
    done, unreadable = 0, []
    batches = readable(loader, skip_corrupt=skip_corrupt)
    for batch in track(batches, f"decoding {name}", len(loader), console=console, transient=True):
        unreadable += batch.unreadable
        if len(batch.labels):
            places = slice(done, done + len(batch.labels))
            pixels[places], labels[places] = batch.images, batch.labels
            done = places.stop
    if not done:
        raise CorruptImageError(f"{unreadable[0].message} Nor can any other of the {name}.")
    if unreadable:
        said = f"decoding {name}: {len(unreadable)} unreadable left out, the first: {unreadable[0].message}"
        console.print(Text(printable(said)))
    return ResidentImages(pixels[:done], labels[:done])


def _supported(augmentation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`crop_and_flip`.

    Raises:
        ConfigError: naming what it cannot do.
    """
    known = ("scale", "ratio", "hflip", "vflip", "interpolation")
    # What timm adds unless it is told not to.
    asked = {"color_jitter": 0.4, "interpolation": "random", **augmentation}
    for name, value in asked.items():
        if name not in known and value not in _NOTHING:
            raise ConfigError(
                f"The recipe's augmentation.{name} = {value} needs images decoded at every step: leave out "
                f"--decode-once, or set it to null (--set augmentation.{name}=null)."
            )
    if asked["interpolation"] not in ("bilinear", "bicubic"):
        raise ConfigError(
            "With --decode-once augmentation.interpolation must be bilinear or bicubic, not "
            f"{asked['interpolation']!r}."
        )
    return {name: asked[name] for name in known if asked.get(name) is not None}
