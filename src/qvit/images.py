"""Opening image files: every kind that people have, as 8-bit RGB or grey. No PyTorch here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from qvit.errors import CorruptImageError

Mode = Literal["RGB", "L"]


def open_image(path: str | Path, mode: Mode = "RGB") -> Image.Image:
    """Return the image at ``path`` upright (EXIF), decoded in full, converted to ``mode``.

    CMYK and palette images are converted, 16-bit grey is scaled to 8 bits (Pillow alone would clip it), an alpha
    channel is laid over white.

    Raises:
        CorruptImageError: naming the file, if it is absent, no image, cut short, or too large to be decoded safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                return _to_mode(ImageOps.exif_transpose(file), mode)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Warning) as error:
        raise CorruptImageError(f"{path} cannot be read as an image: {error}.") from error


def _to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders; PNG decoders may widen it to I
        image = Image.fromarray(np.round(np.clip(np.asarray(image, np.float64), 0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert(mode)
