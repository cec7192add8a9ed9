"""What transformers' ``preprocessor_config.json`` says of images, in timm's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvit.errors import ConfigError, UnsupportedModelError
from qvit.files import shown
from qvit.format.fields import is_number, is_whole
from qvit.models.arguments import MAX_SIDE
from qvit.models.reading import read_json

_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By Pillow's numbers."""


def preprocessing_in(folder: Path, source: str, channels: int) -> dict[str, Any]:
    """Return what a folder of transformers' says of mean, std, resizing, cropping and the size that comes out.

    Nothing if it does not.

    Where an odd number of pixels is cut off, timm's crop lies one pixel beside transformers'.

    Args:
        folder: with ``preprocessor_config.json``, or ``processor_config.json`` where texts are processed too.
        source: where it comes from, for messages.
        channels: of an image.

    Raises:
        CheckpointError: if the file cannot be read.
        ConfigError: if it holds something else than such settings.
        UnsupportedModelError: if images are processed as no file of qvit's can say.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            config = read_json(folder / name, source)
            config = config.get("image_processor", config)
            if not isinstance(config, dict):
                raise ConfigError(f"image_processor of {name} is {shown(config)}.")
            sizes = _sizes(config)
            if "input_size" in sizes:
                sizes["input_size"] = [channels, *sizes["input_size"]]
            return {**_values(config, channels), **sizes}
    return {}


def _values(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return mean and std of values from 0 to 1, whatever pixels are scaled to before they are normalized."""
    if config.get("do_flip_channel_order"):
        raise UnsupportedModelError("it takes blue, green and red in this order (do_flip_channel_order).")
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not is_number(factor) or not 0 < factor < math.inf:
        raise ConfigError(f"rescale_factor must be a number above 0, not {shown(factor)}.")
    white = 255 * factor
    if mean is None or std is None:
        if not math.isclose(white, 1):
            raise ConfigError(f"rescale_factor is {shown(factor)}, and image_mean or image_std is absent.")
        return {}
    if math.isclose(white, 1):
        return {"mean": mean, "std": std}
    for name, numbers in (("image_mean", mean), ("image_std", std)):
        if not isinstance(numbers, list) or not all(is_number(number) for number in numbers):
            raise ConfigError(f"{name} must be a number per channel, not {shown(numbers)}.")
    return {"mean": [number / white for number in mean], "std": [number / white for number in std]}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return crop, interpolation, and height and width that come out where they are given."""
    found: dict[str, Any] = {}
    resample = config.get("resample")
    if resample is not None:
        if not is_whole(resample, 0, len(_RESAMPLING) - 1):
            raise ConfigError(f"resample must be one of Pillow's numbers, 0 to 5, not {shown(resample)}.")
        found["interpolation"] = _RESAMPLING[resample]
    size, crops = config.get("size"), bool(config.get("do_center_crop") and "crop_size" in config)
    if config.get("do_pad"):
        raise UnsupportedModelError("its images are padded (do_pad).")
    edges = set(size) if isinstance(size, dict) else set()
    keeps_shape = bool(edges) and not edges <= {"height", "width"}  # one edge is given
    if keeps_shape and edges != {"shortest_edge"}:
        raise UnsupportedModelError(
            f"its images are resized to {shown(size)}, and qvit knows height and width, or shortest_edge."
        )
    resized = config.get("do_resize", True)
    if not crops:
        if keeps_shape and resized:
            raise UnsupportedModelError("its images keep their shape: shortest_edge is given, and no crop.")
        if size is not None and resized:
            sides = [size["height"], size["width"]] if edges == {"height", "width"} else [_side(size, "size")] * 2
            if not all(is_whole(side, 1, MAX_SIDE) for side in sides):
                raise ConfigError(f"size of the preprocessor must be numbers of pixels, not {shown(size)}.")
            found["input_size"] = sides
        return {**found, "crop_pct": 1.0, "crop_mode": "squash"}
    if not resized:
        raise UnsupportedModelError("its images are cropped and not resized (do_resize).")
    side, crop = _side(size, "size"), _side(config["crop_size"], "crop_size")
    fraction = crop / side
    if math.floor(crop / fraction) < side:  # timm rounds down
        fraction = math.nextafter(fraction, 0)
    squashed = bool(edges) and not keeps_shape
    found |= {"crop_pct": fraction, "crop_mode": "squash" if squashed else "center"}
    return {**found, "input_size": [crop, crop]}


def _side(size: Any, name: str) -> int:
    sides: list[Any] = list(size.values()) if isinstance(size, dict) else [size]
    if not sides or not all(is_whole(side, 1, MAX_SIDE) for side in sides):
        raise ConfigError(f"{name} of the preprocessor must be a number of pixels, not {shown(size)}.")
    if len(set(sides)) > 1:
        raise UnsupportedModelError(f"its {name} is {shown(size)}: where images are cropped, qvit knows squares alone.")
    return int(sides[0])
