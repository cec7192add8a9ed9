from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvit.errors import CorruptImageError
from qvit.images import open_image


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
