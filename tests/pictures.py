"""Images of every kind for property tests, and what their pixels have to be."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps

PREPROCESSING = {
    "input_size": (3, 8, 8),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bilinear",
}
"""Of images of 8 x 8."""
FORMATS = {
    "1": ("PNG", "TIFF"),
    "L": ("PNG", "JPEG", "TIFF", "BMP"),
    "LA": ("PNG",),
    "P": ("PNG", "GIF", "BMP"),
    "RGB": ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"),
    "RGBA": ("PNG", "WEBP", "TIFF"),
    "CMYK": ("JPEG", "TIFF"),
    "I;16": ("PNG", "TIFF"),
}
"""File formats by mode."""
TURNED = ("PNG", "JPEG", "TIFF", "WEBP")
"""Formats that hold an EXIF orientation."""
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".TIF", "JPEG2000": ".jp2"}


@dataclasses.dataclass(frozen=True)
class File:
    """The bytes of an image file and a suffix that fits."""

    content: bytes
    suffix: str


@st.composite
def files(draw: st.DrawFn, largest: int = 40) -> File:
    mode = draw(st.sampled_from(sorted(FORMATS)))
    kind = draw(st.sampled_from(FORMATS[mode]))
    size = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = noise(mode, size, rng)
    options: dict[str, object] = {}
    if kind in TURNED and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))
        options["exif"] = exif
    if mode == "P" and kind != "BMP" and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 255))
    if mode in ("L", "RGB") and kind == "PNG" and draw(st.booleans()):
        options["transparency"] = 7 if mode == "L" else (0, 0, 0)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return File(file.getvalue(), SUFFIXES.get(kind, f".{kind.lower()}"))


def noise(mode: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return an image of random pixels."""
    width, height = size
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "P":
        image = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image
    if mode in ("1", "L"):
        return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).convert(mode)
    pixels = rng.integers(0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def expected(file: Image.Image, mode: str) -> Image.Image:
    """Return an image upright, laid on white and converted, all of it at once: what a picture has to give."""
    file.load()
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)
