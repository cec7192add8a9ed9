"""Images of every kind that people have, as 8-bit RGB or grey. No PyTorch here.

Whatever the route of an image to a model (a path, bytes, an open file, an array, an image of Pillow; a folder, a shard,
a data set of another library), it becomes a :class:`Picture`, so that training and the engine see the same pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from qvit.errors import ConfigError, CorruptImageError
from qvit.files import BytesLike, cut, first_line, has_buffer

Mode = Literal["RGB", "L"]
ImageSource = str | os.PathLike[str] | BytesLike | IO[bytes] | NDArray[np.uint8] | Image.Image

MEMORY = 2**30
"""Bytes that decoding one image may take; what is larger is refused by its number of pixels before it is decoded."""
_BYTES = {"AVIF": 17, "JPEG2000": 28, "WEBP": 17}
"""Bytes a pixel that Pillow's decoders take at their peak, measured; no other takes more than ``_BYTES_OF_OTHERS``."""
_BYTES_OF_OTHERS = 12
_STRIP = 2**20
"""Pixels that are converted at a time."""
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""The formats whose decoders Pillow loads at once; the others are tried after them."""
_NOT_PIXELS = ("EPS", "MPEG")
"""What Pillow opens and does not decode itself: for EPS it would start Ghostscript."""
_WARNING_FILTERS = threading.RLock()  # warnings.catch_warnings changes them for the whole process
if hasattr(os, "register_at_fork"):  # else a child would begin with the filters, and the lock, of another thread's call
    os.register_at_fork(
        before=_WARNING_FILTERS.acquire,
        after_in_parent=_WARNING_FILTERS.release,
        after_in_child=_WARNING_FILTERS.release,
    )


class Turn(NamedTuple):
    """How a stored image is made upright: its axes swapped, then mirrored left to right, then top to bottom."""

    swapped: bool = False
    mirrored: bool = False
    flipped: bool = False


UPRIGHT = Turn()
_ORIENTATIONS = {
    2: Turn(mirrored=True),
    3: Turn(mirrored=True, flipped=True),
    4: Turn(flipped=True),
    5: Turn(swapped=True),
    6: Turn(swapped=True, mirrored=True),
    7: Turn(swapped=True, mirrored=True, flipped=True),
    8: Turn(swapped=True, flipped=True),
}
"""Turns by EXIF orientation."""
_METHODS = dict(
    zip(
        _ORIENTATIONS.values(),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded image that is turned and converted where its pixels are used, and not before.

    CMYK and palette images are converted, 16-bit grey is scaled to 8 bits (Pillow alone would clip it), an alpha
    channel is laid over white.

    Args:
        stored: the pixels as the file has them.
        mode: in which a model takes them.
        turn: from the stored pixels to the upright image.
    """

    stored: Image.Image
    mode: Mode
    turn: Turn = UPRIGHT

    @property
    def width(self) -> int:
        """Of the upright image, in pixels."""
        return self.stored.height if self.turn.swapped else self.stored.width

    @property
    def height(self) -> int:
        """Of the upright image, in pixels."""
        return self.stored.width if self.turn.swapped else self.stored.height

    @property
    def narrow_mode(self) -> Mode:
        """In which :meth:`crop` returns pixels: grey for a grey image, even if the model takes RGB."""
        grey = self.stored.mode.startswith("I") or (
            self.stored.mode in ("1", "L") and not self.stored.has_transparency_data
        )
        return "L" if grey else self.mode

    @property
    def is_plain(self) -> bool:
        """Whether :meth:`crop` takes the pixels as they are stored."""
        converted = self.stored.mode != self.narrow_mode or self.stored.has_transparency_data
        return self.turn == UPRIGHT and not converted

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """Return the pixels of a ``box`` (left, top, right, bottom) of the upright image, in :attr:`narrow_mode`.

        They may be the stored image itself, so they are not to be changed.
        """
        left, top, right, bottom = box
        if self.is_plain and box == (0, 0, self.width, self.height):
            return self.stored
        canvas = Image.new(self.narrow_mode, (right - left, bottom - top))
        rows = max(1, _STRIP // (right - left))
        for row in range(top, bottom, rows):
            canvas.paste(self._strip(left, row, right, min(row + rows, bottom)), (0, row - top))
        return canvas

    def whole(self) -> Image.Image:
        """Return the upright image, in :attr:`mode`; it may be the stored one, so it is not to be changed."""
        image = self.crop((0, 0, self.width, self.height))
        return image if image.mode == self.mode else image.convert(self.mode)

    def _strip(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        if self.turn.mirrored:
            left, right = self.width - right, self.width - left
        if self.turn.flipped:
            top, bottom = self.height - bottom, self.height - top
        if self.turn.swapped:
            left, top, right, bottom = top, left, bottom, right
        strip = _narrow(self.stored.crop((left, top, right, bottom)), self.narrow_mode)
        return strip if self.turn == UPRIGHT else strip.transpose(_METHODS[self.turn])


def open_picture(source: ImageSource, mode: Mode = "RGB", name: str | None = None) -> Picture:
    """Decode an image; safe to call from several threads at once.

    Args:
        source: a path, a file's bytes in any buffer, a file open in binary mode (it is read from its start and stays
            open), a uint8 array ``(H, W)`` or ``(H, W, C)`` of 1 (grey), 3 (RGB) or 4 (RGBA) channels, or an image of
            Pillow. Where it has an EXIF orientation, that is followed.
        mode: in which the model takes it, see :func:`mode_of`.
        name: what an error calls it; by default its path or its type.

    Raises:
        CorruptImageError: naming the image, if it is absent, no image, cut short, of more pixels than can be decoded in
            :data:`MEMORY`, or of floating-point, signed or 32-bit pixels, whose range the file does not tell.
    """
    try:
        image = _decoded(source)
        _check(image)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        picture = Picture(image, mode, _ORIENTATIONS.get(orientation, UPRIGHT))
        picture.crop((0, 0, 1, 1))  # raises where Pillow cannot convert the mode
    except Exception as error:  # each of Pillow's decoders has its own: OSError, SyntaxError, RuntimeError, ...
        called = cut(name or name_of(source, "The image"))
        raise CorruptImageError(f"{called} cannot be read as an image: {_reason(error)}") from error
    return picture


def name_of(source: ImageSource, name: str) -> str:
    """Return what an error calls an image: its path, or else ``name`` and its type."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"{name} ({type(source).__name__})"


def is_one(source: object) -> bool:
    """Return whether ``source`` is one image in one of the forms that :func:`open_picture` takes, and not several."""
    known = isinstance(source, (str, os.PathLike, np.ndarray, Image.Image)) or hasattr(source, "read")
    return known or has_buffer(source)


def mode_of(channels: int) -> Mode:
    """Return the mode in which a model of so many input channels takes images: grey or RGB.

    Raises:
        ConfigError: for another number than 1 or 3.
    """
    if channels not in (1, 3):
        raise ConfigError(f"The model takes {channels} channels; image files are opened with 1 (grey) or 3 (RGB).")
    return "L" if channels == 1 else "RGB"


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes (``".png"``, in lower case) of the files that Pillow, as it is installed, decodes."""
    formats = (*_COMMON, *_other_formats())
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


@functools.cache
def _other_formats() -> tuple[str, ...]:
    """Return all formats that Pillow decodes but the common ones, those that look at a file's first bytes first."""
    Image.init()

    def decodes(name: str) -> bool:
        factory = Image.OPEN[name][0]
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return not stub and name not in (*_COMMON, *_NOT_PIXELS)

    return tuple(sorted(filter(decodes, Image.OPEN), key=lambda name: (Image.OPEN[name][1] is None, name)))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it."
    return f"{error.strerror}." if isinstance(error, OSError) and error.strerror else first_line(error)


def _decoded(source: ImageSource) -> Image.Image:
    if isinstance(source, (np.ndarray, Image.Image)):
        image = _from_array(source) if isinstance(source, np.ndarray) else source
        _check_size(image)
        _load(image)
        return image
    with _stream(source) as stream:
        image = _identified(stream)
        _check_size(image)
        image.load()
        return image


@contextlib.contextmanager
def _stream(source: str | os.PathLike[str] | BytesLike | IO[bytes]) -> Iterator[IO[bytes]]:
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file
    elif has_buffer(source):
        yield io.BytesIO(bytes(source))
    elif isinstance(source, io.TextIOBase):
        raise ValueError("open the file in binary mode ('rb')")
    elif hasattr(source, "read"):
        yield _from_the_start(source)  # type: ignore[arg-type]
    else:
        raise ValueError("give a path, bytes, a file open in binary mode, a uint8 array (H, W, C) or a Pillow image")


def _from_the_start(file: IO[bytes]) -> IO[bytes]:
    try:
        file.seek(0)
    except (AttributeError, OSError):  # a pipe, a response
        return io.BytesIO(file.read())
    return file


def _load(image: Image.Image) -> None:
    """Decode an image that someone else has opened, as if it had been opened here."""
    if not isinstance(image, ImageFile.ImageFile):
        image.load()
        return
    path = image.filename
    try:
        image.filename = ""  # else Pillow maps the file into memory, and turns an uncompressed TIFF wrongly
        image.load()
    finally:
        image.filename = path


def _from_array(array: NDArray[Any]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        form = f"{array.dtype} {cut(str(array.shape))}"
        raise ValueError(f"an array must be one image, uint8 (H, W, C) of 1, 3 or 4 channels, not {form}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


def _identified(stream: IO[bytes]) -> Image.Image:
    """Return the image in a file, not decoded yet; formats are tried in one order, whatever the process did before."""
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(stream, formats=_COMMON)
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(stream, formats=_other_formats())
    stream.seek(0)
    raise ValueError("its content has none of the formats that Pillow decodes" if stream.read(1) else "it is empty")


def _check_size(image: Image.Image) -> None:
    pixels, most = image.width * image.height, MEMORY // _BYTES.get(image.format or "", _BYTES_OF_OTHERS)
    if not pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    if pixels > most:
        kind = f" of a {image.format} file" if image.format else ""
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, and at most {most}{kind} are decoded: scale it down"
        )


def _check(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("it has floating-point pixels, save it with 8 or 16 bits")
    if image.mode == "I" and image.format != "PPM":  # whose decoder scales what has more than 8 bits to 16
        raise ValueError("it has signed or 32-bit pixels, save it with 8 or 16 bits")


def _narrow(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders, or PPM's I
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)
