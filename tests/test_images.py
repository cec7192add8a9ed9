import io
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from pictures import File, expected, files, noise
from qvit.errors import CorruptImageError
from qvit.images import Mode, open_picture, suffixes


def opened(path: Path, mode: Mode = "RGB") -> Image.Image:
    return open_picture(path, mode).whole()


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = save(Image.fromarray(values), tmp_path / "deep.png")
    assert np.asarray(opened(path, "L")).tolist() == [[0, 1, 128, 255]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "ink.jpg", quality=100)
    red, green, blue = np.asarray(opened(path)).reshape(-1, 3).mean(axis=0)
    assert red > 240
    assert green < 15
    assert blue < 15


def test_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 1)
    path = save(image, tmp_path / "palette.png", transparency=0)
    pixels = np.asarray(opened(path))
    assert pixels[0, 0].tolist() == [200, 10, 10]
    assert (pixels[1:] == 255).all()


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    path = save(Image.new("RGBA", (2, 2), (0, 0, 0, 51)), tmp_path / "alpha.png")
    assert (np.asarray(opened(path)) == 204).all()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("RGB", (8, 4)), tmp_path / "turned.jpg", exif=exif)
    assert opened(path).size == (4, 8)


def test_single_pixel_opens(tmp_path: Path) -> None:
    path = save(Image.new("1", (1, 1), 1), tmp_path / "one.png")
    assert np.asarray(opened(path)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, fraction: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    with pytest.raises(CorruptImageError, match=f"cut.{suffix}"):
        opened(path)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("L", (64, 64)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CorruptImageError, match="bomb"):
        opened(path)


def test_text_named_as_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(CorruptImageError, match="text.png"):
        opened(path)


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[65536]]), np.int32([[-1]]), np.int32([[200]])])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray, mode: Mode) -> None:
    path = save(Image.fromarray(values), tmp_path / "science.tiff")
    with pytest.raises(CorruptImageError, match=r"science.tiff .*: it has .* pixels, save it with 8 or 16 bits\.$"):
        opened(path, mode)


def test_sixteen_bits_of_every_format_are_scaled_and_32_of_memory_refused(tmp_path: Path) -> None:
    deep = Image.fromarray(np.uint16([[0, 257 * 100, 65535]]))
    for suffix in ("png", "tiff", "pgm"):
        path = save(deep, tmp_path / f"deep.{suffix}")
        assert np.asarray(opened(path, "L")).tolist() == [[0, 100, 255]]
    with pytest.raises(CorruptImageError, match="it has signed or 32-bit pixels"):
        open_picture(Image.new("L", (2, 2), 200).convert("I"), "L")


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    path = save(Image.new("LA", (2, 2), (0, 51)), tmp_path / "grey.png")
    assert (np.asarray(opened(path, "L")) == 204).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "avif"])
def test_damaged_file_opens_or_is_named(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"damaged.{suffix}"
    good = save(Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)), path, exif=exif).read_bytes()
    refused = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, about damaged tags
        for _ in range(150):
            data = np.frombuffer(good, np.uint8).copy()
            data[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(data.tobytes())
            try:
                assert opened(path).mode == "RGB"
            except CorruptImageError as error:
                refused.append(str(error))
    assert refused
    assert all(message.startswith(str(path)) for message in refused)


def test_opening_in_threads_leaves_the_warning_filters_alone(tmp_path: Path) -> None:
    path = save(Image.new("L", (8, 8)), tmp_path / "small.png")
    before = list(warnings.filters)

    def work() -> None:
        for _ in range(100):
            opened(path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize("mode", ["RGB", "L"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=files(), data=st.data())
def test_every_picture_has_the_pixels_of_the_upright_converted_image(
    mode: Mode, file: File, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvit.images._STRIP", data.draw(st.sampled_from([1, 50, 2**20])))
    picture, image = open_picture(file.content, mode), expected(Image.open(io.BytesIO(file.content)), mode)
    assert (picture.width, picture.height) == image.size
    whole = picture.whole()
    assert whole.mode == mode
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(image))
    left, right = sorted(data.draw(st.lists(st.integers(0, image.width), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, image.height), min_size=2, max_size=2, unique=True)))
    box = (left, top, right, bottom)
    part = picture.crop(box)
    assert part.mode == picture.narrow_mode
    np.testing.assert_array_equal(np.asarray(part.convert(mode)), np.asarray(image.crop(box)))


def test_a_grey_image_is_not_widened_before_it_must_be() -> None:
    for image in (Image.new("L", (2, 2)), Image.new("1", (2, 2)), Image.fromarray(np.zeros((2, 2), np.uint16))):
        picture = open_picture(image, "RGB")
        assert picture.crop((0, 0, 2, 1)).mode == "L"
        assert picture.whole().mode == "RGB"


class Pipe(io.RawIOBase):
    """A file that can be read once, from its start to its end."""

    def __init__(self, content: bytes) -> None:
        self.rest = content

    def read(self, size: int = -1) -> bytes:
        taken, self.rest = (self.rest, b"") if size < 0 else (self.rest[:size], self.rest[size:])
        return taken


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])  # one that is tried first, and another
def test_bytes_and_files_are_images_too(tmp_path: Path, kind: str) -> None:
    image = noise("RGB", (5, 4), np.random.default_rng(0))
    written = io.BytesIO()
    image.save(written, kind, lossless=True)  # and stands at its end
    content = written.getvalue()
    path = tmp_path / "a.dat"
    path.write_bytes(content)
    with path.open("rb") as file:
        for source in (path, str(path), content, bytearray(content), memoryview(content), written, file, Pipe(content)):
            np.testing.assert_array_equal(np.asarray(open_picture(source).whole()), np.asarray(image))
        assert not file.closed
        assert not written.closed


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_arrays_are_images_too(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(array[..., 0] if shape[2:] == (1,) else array)
    turned = np.ascontiguousarray(np.moveaxis(array, 0, 1)).swapaxes(0, 1)  # not contiguous
    for given_array in (array, turned):
        np.testing.assert_array_equal(np.asarray(open_picture(given_array).whole()), np.asarray(expected(image, "RGB")))


NO_IMAGES: list[tuple[object, str]] = [
    (np.zeros((3, 4, 5), np.uint8), r"uint8 \(H, W, C\) of 1, 3 or 4 channels, not uint8 \(3, 4, 5\)"),
    (np.zeros((2, 4, 5, 3), np.uint8), "one image"),
    (np.zeros((4, 5, 3)), "float64"),
    (np.zeros((4, 0, 3), np.uint8), "0 x 4 pixels"),
    (np.zeros((1,) * 32, np.uint8), "one image"),  # as many dimensions as NumPy 1 has
    (b"", "it is empty"),
    (b"no image" * 100_000, "none of the formats"),
    ("A" * 500_000, "AAA.*File name too long"),
    ("/nowhere/\0/x.png", "null"),
    (io.StringIO("text"), "binary mode"),
    (io.BytesIO(), "it is empty"),
    (7, "give a path"),
    (None, "give a path"),
    ({"image": 1}, "give a path"),
    (Path(), "directory"),
    (Image.new("F", (1, 1)), "floating-point"),
    (Image.new("La", (1, 1)), "La"),
    (Image.new("RGB", (0, 3)), "0 x 3 pixels"),
]


@pytest.mark.parametrize(("source", "reason"), NO_IMAGES, ids=range(len(NO_IMAGES)))
def test_what_is_no_image_is_refused_in_a_sentence(source: Any, reason: str) -> None:
    with pytest.raises(CorruptImageError, match=reason) as caught:
        open_picture(source)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_closed_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = save(Image.new("L", (2, 2)), tmp_path / "a.png")
    with path.open("rb") as file:
        pass
    image = Image.open(path)
    image.close()
    for source in (file, image):
        with pytest.raises(CorruptImageError, match=r"\(\w+\) cannot be read as an image: .*closed"):
            open_picture(source)


def test_too_many_pixels_are_refused_by_their_number_on_every_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, cost in (("png", 12), ("webp", 17), ("jp2", 28)):
        path = save(Image.new("RGB", (11, 10)), tmp_path / f"large.{kind}")
        monkeypatch.setattr("qvit.images.MEMORY", 110 * cost)
        assert open_picture(path).whole().size == (11, 10)
        monkeypatch.setattr("qvit.images.MEMORY", 110 * cost - 1)
        for source in (path, path.read_bytes(), path.open("rb"), Image.open(path)):
            with pytest.raises(
                CorruptImageError, match="11 x 10 pixels, and at most 109 .* are decoded: scale it down"
            ):
                open_picture(source)
    monkeypatch.setattr("qvit.images.MEMORY", 110 * 12 - 1)
    with pytest.raises(CorruptImageError, match="11 x 10 pixels, and at most 109 are decoded"):
        open_picture(np.zeros((10, 11, 3), np.uint8))


def test_formats_are_found_by_content_alone_and_in_one_order(tmp_path: Path) -> None:
    # TGA has no signature: Pillow finds it where the suffix says so, or nothing else fits.
    image = noise("RGB", (4, 3), np.random.default_rng(0))
    path = save(image, tmp_path / "a.tga")
    np.testing.assert_array_equal(np.asarray(open_picture(path).whole()), np.asarray(image))
    for source in (path.read_bytes(), path.rename(tmp_path / "a.jpg")):
        np.testing.assert_array_equal(np.asarray(open_picture(source).whole()), np.asarray(image))


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_args: pytest.fail("Ghostscript was started"))
    path = save(Image.new("RGB", (4, 4)), tmp_path / "drawing.eps")
    for name in ("drawing.eps", "drawing.png"):
        with pytest.raises(CorruptImageError, match="none of the formats"):
            open_picture(path.rename(tmp_path / name))
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5"} & suffixes()


def test_suffixes_are_those_that_pillow_decodes() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"} <= suffixes()
    assert (".avif" in suffixes()) == features.check("avif")
    assert not {".pdf", ".txt", ".db", ".xml", ""} & suffixes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_opened_with_pillow_is_turned_as_its_file_is(
    tmp_path: Path, suffix: str, mode: str, orientation: int
) -> None:
    # Pillow maps an uncompressed TIFF into memory where it knows the path, and turned some of them wrongly then.
    if (mode in ("RGBA", "L") and suffix == "jpg") or (mode == "CMYK" and suffix in ("png", "webp")):
        pytest.skip("no such file")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(noise(mode, (3, 5), np.random.default_rng(0)), tmp_path / f"a.{suffix}", exif=exif)
    picture = open_picture(path)
    assert (picture.width, picture.height) == ((5, 3) if orientation > 4 else (3, 5))
    np.testing.assert_array_equal(np.asarray(open_picture(Image.open(path)).whole()), np.asarray(picture.whole()))
