"""From an image to a model's input: timm's evaluation transform in Pillow and NumPy, the same to the last bit.

What is resized, cropped and padded how is timm's (``timm.data.create_transform(is_training=False)``); a test holds the
two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvit.errors import CorruptImageError
from qvit.images import mode_of, to_mode

_LARGEST = 2**24
"""Pixels up to which the whole image is resized before it is cropped, as timm does. A strip of 1 x 60000 pixels would
need gigabytes that way: of a larger one only what the crop keeps is computed, the same but for rounding."""


def preprocess(image: Image.Image, preprocessing: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return one image as a model takes it.

    Args:
        image: of any size and of any mode that :func:`qvit.images.to_mode` converts.
        preprocessing: as a packed file holds it: ``input_size`` [channels, height, width], ``interpolation``, ``mean``
            and ``std`` (a number a channel, of values from 0 to 1), ``crop_pct`` (edge of the crop to that of the
            resized image) and ``crop_mode``: ``"center"`` (shorter edge resized, the rest cut off), ``"squash"`` (both
            edges resized) or ``"border"`` (longer edge resized, the rest filled with the mean).

    Returns:
        float32, ``(C, H, W)``.

    Raises:
        CorruptImageError: if the image has no pixels or its mode cannot be converted.
        ConfigError: if the model takes neither 1 channel nor 3.
    """
    mode = mode_of(preprocessing["input_size"][0])
    try:
        image = to_mode(image, mode)
    except ValueError as error:
        raise CorruptImageError(f"An image of mode {image.mode} cannot be used: {error}.") from error
    if 0 in image.size:
        raise CorruptImageError(f"An image of {image.width} x {image.height} pixels cannot be used.")
    fitted = _fit(image, preprocessing)
    pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, -1).transpose(2, 0, 1)
    mean, std = (np.asarray(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
    scaled: NDArray[np.float32] = np.divide(pixels, np.float32(255), dtype=np.float32, order="C")
    scaled -= mean
    scaled /= std
    return scaled


def preprocess_batch(images: Sequence[Image.Image], preprocessing: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return images as a model takes them: float32, ``(B, C, H, W)``, each as :func:`preprocess` gives it."""
    batch = np.empty((len(images), *preprocessing["input_size"]), np.float32)
    for slot, image in zip(batch, images, strict=True):
        slot[:] = preprocess(image, preprocessing)
    return batch


def _fit(image: Image.Image, preprocessing: Mapping[str, Any]) -> Image.Image:
    """Resize, then cut or fill each axis around its middle to the size of the model's input."""
    crop_height, crop_width = preprocessing["input_size"][1:]
    mode = preprocessing["crop_mode"]
    width, height = _resized(image.size, (crop_width, crop_height), preprocessing["crop_pct"], mode)
    left, top = _offset(width, crop_width), _offset(height, crop_height)
    resample = Image.Resampling[preprocessing["interpolation"].upper()]
    if width * height <= _LARGEST:
        resized = image.resize((width, height), resample)
    else:
        x, y = max(left, 0), max(top, 0)
        kept = min(width, crop_width), min(height, crop_height)
        across, down = image.width / width, image.height / height
        box = (x * across, y * down, (x + kept[0]) * across, (y + kept[1]) * down)
        resized = image.resize(kept, resample, box)
        left, top = min(left, 0), min(top, 0)
    fill = [round(255 * min(max(m, 0), 1)) if mode == "border" else 0 for m in preprocessing["mean"]]
    canvas = Image.new(image.mode, (crop_width, crop_height), tuple(fill))
    canvas.paste(resized, (-left, -top))
    return canvas


def _resized(size: tuple[int, int], crop: tuple[int, int], crop_pct: float, mode: str) -> tuple[int, int]:
    """Return width and height after resizing, before the crop."""
    width, height = size
    target = math.floor(crop[0] / crop_pct), math.floor(crop[1] / crop_pct)
    if mode == "squash":
        return target
    if mode == "center" and target[0] == target[1]:  # torchvision rounds down here, timm below to the nearest
        longer = int(target[0] * max(size) / min(size))
        return (target[0], longer) if width <= height else (longer, target[0])
    ratios = width / target[0], height / target[1]
    ratio = max(ratios) if mode == "border" else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _offset(length: int, crop: int) -> int:
    """Return where the crop of one axis starts; below 0 where it is to be filled."""
    return -((crop - length) // 2) if crop > length else round((length - crop) / 2)
