"""Opening image files: every kind that people have, as 8-bit RGB or grey. No PyTorch here."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from qvit.errors import ConfigError, CorruptImageError
from qvit.files import first_line

Mode = Literal["RGB", "L"]
_WARNING_FILTERS = threading.Lock()  # warnings.catch_warnings changes them for the whole process


def open_image(path: str | Path, mode: Mode = "RGB", content: bytes | None = None) -> Image.Image:
    """Return the image at ``path`` upright (EXIF), decoded in full, converted to ``mode``.

    CMYK and palette images are converted, 16-bit grey is scaled to 8 bits (Pillow alone would clip it), an alpha
    channel is laid over white. Safe to call from several threads at once. With ``content``, the bytes of a file that
    was read already, ``path`` only names it in an error.

    Raises:
        CorruptImageError: naming the file, if it is absent, no image, cut short, too large to be decoded safely, or of
            floating-point or 32-bit pixels, whose range the file does not tell.
    """
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(path if content is None else io.BytesIO(content))
        with file:
            file.load()
            return to_mode(ImageOps.exif_transpose(file), mode)
    except Exception as error:  # each of Pillow's decoders has its own: OSError, SyntaxError, RuntimeError, ...
        raise CorruptImageError(f"{path} cannot be read as an image: {first_line(error)}") from error


def mode_of(channels: int) -> Mode:
    """Return the mode in which a model of so many input channels takes images: grey or RGB.

    Raises:
        ConfigError: for another number than 1 or 3.
    """
    if channels not in (1, 3):
        raise ConfigError(f"The model takes {channels} channels; image files are opened with 1 (grey) or 3 (RGB).")
    return "L" if channels == 1 else "RGB"


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Return ``image`` as ``mode``, converted as :func:`open_image` says.

    Raises:
        ValueError: for floating-point or 32-bit pixels, and for what Pillow cannot convert.
    """
    if image.mode.startswith("I"):  # I;16 and its byte orders; decoders may widen it to I
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError("it has 32-bit pixels, save it with 8 or 16 bits")
        image = Image.fromarray(np.round(deep / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("it has floating-point pixels, save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert(mode)
