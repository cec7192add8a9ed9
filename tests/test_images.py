import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvit.errors import CorruptImageError
from qvit.images import Mode, open_image


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = save(Image.fromarray(values), tmp_path / "deep.png")
    assert np.asarray(open_image(path, "L")).tolist() == [[0, 1, 128, 255]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "ink.jpg", quality=100)
    red, green, blue = np.asarray(open_image(path)).reshape(-1, 3).mean(axis=0)
    assert red > 240
    assert green < 15
    assert blue < 15


def test_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 1)
    path = save(image, tmp_path / "palette.png", transparency=0)
    pixels = np.asarray(open_image(path))
    assert pixels[0, 0].tolist() == [200, 10, 10]
    assert (pixels[1:] == 255).all()


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    path = save(Image.new("RGBA", (2, 2), (0, 0, 0, 51)), tmp_path / "alpha.png")
    assert (np.asarray(open_image(path)) == 204).all()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("RGB", (8, 4)), tmp_path / "turned.jpg", exif=exif)
    assert open_image(path).size == (4, 8)


def test_single_pixel_opens(tmp_path: Path) -> None:
    path = save(Image.new("1", (1, 1), 1), tmp_path / "one.png")
    assert np.asarray(open_image(path)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CorruptImageError, match=f"cut.{suffix}"):
        open_image(path)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("L", (64, 64)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CorruptImageError, match="bomb"):
        open_image(path)


def test_text_named_as_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(CorruptImageError, match="text.png"):
        open_image(path)


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray, mode: Mode) -> None:
    path = save(Image.fromarray(values), tmp_path / "science.tiff")
    with pytest.raises(CorruptImageError, match=r"science.tiff .*: it has .* pixels, save it with 8 or 16 bits\.$"):
        open_image(path, mode)


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    path = save(Image.new("LA", (2, 2), (0, 51)), tmp_path / "grey.png")
    assert (np.asarray(open_image(path, "L")) == 204).all()


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
                assert open_image(path).mode == "RGB"
            except CorruptImageError as error:
                refused.append(str(error))
    assert refused
    assert all(message.startswith(str(path)) for message in refused)


def test_opening_in_threads_leaves_the_warning_filters_alone(tmp_path: Path) -> None:
    path = save(Image.new("L", (8, 8)), tmp_path / "small.png")
    before = list(warnings.filters)

    def work() -> None:
        for _ in range(100):
            open_image(path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
