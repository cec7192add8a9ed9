"""From an image to a model's input: timm's evaluation transform in Pillow and NumPy, the same to the last bit.

What is resized, cropped and padded how is timm's (``timm.data.create_transform(is_training=False)``); a test holds the
two together. Beside the decoded image it takes some ``8 * LARGEST`` bytes, and up to 4 bytes a pixel more where the
image has to be turned or converted; a grey one stays grey until it has the size of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvit.images import ImageSource, Picture, mode_of, name_of, open_picture

LARGEST = 2**24
"""Pixels up to which the whole image is resized before it is cropped, as timm does. A strip of 1 x 60000 pixels would
need gigabytes that way: of a larger one only what the crop keeps is computed, the same but for rounding."""
_REACH = 3
"""Pixels on either side that the widest filter (Lanczos) looks at, where an image is not made smaller."""
Box = tuple[float, float, float, float]


def preprocess(
    image: ImageSource | Picture,
    preprocessing: Mapping[str, Any],
    name: str | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return one image as a model takes it.

    Args:
        image: what :func:`qvit.images.open_picture` opens, or what it returned for the model's mode.
        preprocessing: as a packed file holds it: ``input_size`` [channels, height, width], ``interpolation``, ``mean``
            and ``std`` (a number per channel, of values from 0 to 1), ``crop_pct`` (edge of the crop to that of the
            resized image) and ``crop_mode``: ``"center"`` (shorter edge resized, the rest cut off), ``"squash"`` (both
            edges resized) or ``"border"`` (longer edge resized, the rest filled with the mean).
        name: of the image in errors; by default what it was opened from.
        out: where to write it, a float32 array of the shape that is returned.

    Returns:
        float32, ``(C, H, W)``.

    Raises:
        CorruptImageError: if the image cannot be opened.
        ConfigError: if the model takes neither 1 channel nor 3.
    """
    mean, std = (np.asarray(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
    scaled: NDArray[np.float32] = np.divide(
        fit(image, preprocessing, name), np.float32(255), out=out, dtype=np.float32, order="C"
    )
    scaled -= mean
    scaled /= std
    return scaled


def preprocess_batch(images: Sequence[ImageSource], preprocessing: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return images as a model takes them: float32, ``(B, C, H, W)``, each as :func:`preprocess` gives it."""
    batch = np.empty((len(images), *preprocessing["input_size"]), np.float32)
    for number, (slot, image) in enumerate(zip(batch, images, strict=True)):
        preprocess(image, preprocessing, name_of(image, f"Image {number}"), slot)
    return batch


def fit(image: ImageSource | Picture, preprocessing: Mapping[str, Any], name: str | None = None) -> NDArray[np.uint8]:
    """Return one image resized, then cut or filled around its middle: uint8, ``(C, H, W)``; see :func:`preprocess`."""
    mode = mode_of(preprocessing["input_size"][0])
    picture = image if isinstance(image, Picture) else open_picture(image, mode, name)
    crop_height, crop_width = preprocessing["input_size"][1:]
    crop_mode = preprocessing["crop_mode"]
    width, height = _resized(
        (picture.width, picture.height), (crop_width, crop_height), preprocessing["crop_pct"], crop_mode
    )
    left, top = _offset(width, crop_width), _offset(height, crop_height)
    resample = Image.Resampling[preprocessing["interpolation"].upper()]
    # Pillow resizes one axis after the other, and its versions differ in which is first.
    if max(width * height, width * picture.height, picture.width * height) <= LARGEST:
        resized = picture.crop((0, 0, picture.width, picture.height)).resize((width, height), resample)
    else:
        x, y = max(left, 0), max(top, 0)
        kept = min(width, crop_width), min(height, crop_height)
        across, down = picture.width / width, picture.height / height
        right, bottom = min((x + kept[0]) * across, picture.width), min((y + kept[1]) * down, picture.height)
        resized = _resize_box(picture, kept, (x * across, y * down, right, bottom), resample)
        left, top = min(left, 0), min(top, 0)
    # Pillow takes what is beyond a byte for its end.
    fill = [round(255 * m) if crop_mode == "border" else 0 for m in preprocessing["mean"]]
    canvas = Image.new(mode, (crop_width, crop_height), tuple(fill))
    canvas.paste(resized, (-left, -top))
    return np.array(canvas).reshape(crop_height, crop_width, -1).transpose(2, 0, 1)


def _resize_box(picture: Picture, size: tuple[int, int], box: Box, resample: Image.Resampling) -> Image.Image:
    """Return the ``box`` of an image at ``size``, first along the axis that leaves less to do."""
    (width, height), (left, top, right, bottom) = size, box
    x, end = _reached(left, right, width, picture.width)
    y, last = _reached(top, bottom, height, picture.height)
    image = picture.crop((x, y, end, last))
    if width * image.height <= image.width * height:
        image = image.resize((width, image.height), resample, (left - x, 0, right - x, image.height))
        return image.resize(size, resample, (0, top - y, width, bottom - y))
    image = image.resize((image.width, height), resample, (0, top - y, image.width, bottom - y))
    return image.resize(size, resample, (left - x, 0, right - x, height))


def _reached(start: float, stop: float, pixels: int, length: int) -> tuple[int, int]:
    """Return the first pixel of an axis, and the one after the last, that ``start`` to ``stop`` depends on.

    ``pixels`` is the number of pixels that are made of it, ``length`` that of the whole axis.
    """
    reach = _REACH * max(1.0, (stop - start) / pixels)
    return max(0, math.floor(start - reach)), min(length, math.ceil(stop + reach))


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
