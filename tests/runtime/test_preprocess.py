from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import hypothesis
import numpy as np
import pytest
import timm.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvit.errors import ConfigError, CorruptImageError
from qvit.format.header import CROP_MODES, INTERPOLATIONS
from qvit.images import Picture
from qvit.runtime.preprocess import _resize_box, preprocess, preprocess_batch

SIZES = [
    (1, 1),
    (2, 1),
    (7, 31),
    (16, 16),
    (33, 20),
    (20, 33),
    (224, 224),
    (255, 256),
    (301, 97),
    (97, 301),
    (500, 375),
]


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.9,
        "crop_mode": "center",
        **changes,
    }


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def by_timm(image: Image.Image, preprocessing: dict[str, Any]) -> np.ndarray:
    transform = timm.data.create_transform(**preprocessing, is_training=False)
    return transform(image).numpy()


def assert_same(image: Image.Image, preprocessing: dict[str, Any]) -> None:
    prepared, expected = preprocess(image, preprocessing), by_timm(image, preprocessing)
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    assert prepared.shape == tuple(preprocessing["input_size"])
    np.testing.assert_array_equal(prepared.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("mode", CROP_MODES)
def test_same_bits_as_timm_by_interpolation(mode: str, interpolation: str) -> None:
    for width, height in SIZES:
        assert_same(
            noise(width, height),
            settings(input_size=[3, 48, 48], crop_mode=mode, interpolation=interpolation, crop_pct=0.875),
        )


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 0.9, 0.95, 1.0, 1.2])
@pytest.mark.parametrize("crop", [[15, 15], [32, 32], [31, 20], [20, 31]])
def test_same_bits_as_timm_by_crop(mode: str, crop_pct: float, crop: list[int]) -> None:
    for width, height in SIZES:
        assert_same(noise(width, height), settings(input_size=[3, *crop], crop_mode=mode, crop_pct=crop_pct))


def test_same_bits_as_timm_at_full_size() -> None:
    for width, height in [(500, 375), (640, 480), (224, 300), (1023, 767)]:
        assert_same(noise(width, height), settings())


@pytest.mark.parametrize("mode", CROP_MODES)
def test_same_bits_as_timm_in_grey(mode: str) -> None:
    for width, height in SIZES:
        assert_same(
            noise(width, height, "L"),
            settings(input_size=[1, 32, 32], mean=[0.1307], std=[0.3081], crop_mode=mode, crop_pct=1.0),
        )


def test_a_mean_beyond_all_pixels_fills_with_the_nearest() -> None:
    for mean in ([1.5, -0.3, 0.5], [-40.0, 90.0, 1.0]):
        assert_same(noise(20, 33), settings(input_size=[3, 32, 32], crop_mode="border", mean=mean))


def test_a_strip_that_its_longer_edge_makes_thinner_than_a_pixel_keeps_one() -> None:
    chosen = settings(input_size=[3, 32, 32], crop_mode="border", mean=[0.0] * 3, std=[1.0] * 3)
    for size in ((1, 500), (500, 1)):
        prepared = preprocess(Image.new("RGB", size, "white"), chosen)
        assert (prepared == 1).sum() == 3 * 32


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, float, float, int]:
    """A side's length, where on it a span starts and stops, and how many pixels are made of that."""
    length = draw(st.integers(1, 90))
    start = draw(st.floats(0, length - 0.5))
    return length, start, draw(st.floats(start + 0.5, length)), draw(st.integers(1, 40))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@hypothesis.settings(deadline=None, max_examples=50)
@given(across=spans(), down=spans())
def test_a_box_of_an_image_is_resized_with_all_around_it_that_counts(
    interpolation: str, across: tuple[int, float, float, int], down: tuple[int, float, float, int]
) -> None:
    (width, left, right, columns), (height, top, bottom, rows) = across, down
    size, box, resample = (columns, rows), (left, top, right, bottom), Image.Resampling[interpolation.upper()]
    image = noise(width, height).convert("L").convert("F")  # in floats nothing is rounded between the axes
    picture: Any = SimpleNamespace(width=width, height=height, crop=image.crop)
    found = _resize_box(picture, size, box, resample)
    np.testing.assert_allclose(np.asarray(found), np.asarray(image.resize(size, resample, box)), atol=0.01)


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "vit_base_patch16_clip_224", "vit_tiny_patch16_224"])
def test_same_bits_as_timm_by_model(name: str) -> None:
    model = timm.create_model(name, depth=1)
    assert_same(noise(400, 300), timm.data.resolve_model_data_config(model))


def test_other_modes_are_converted_as_open_image_does() -> None:
    chosen = settings(input_size=[3, 32, 32])
    see_through = noise(40, 50).convert("RGBA")
    see_through.putalpha(60)
    for image in (noise(40, 50, "L"), noise(40, 50, "CMYK"), noise(40, 50, "P"), see_through):
        np.testing.assert_array_equal(preprocess(image, chosen), by_timm(Picture(image, "RGB").whole(), chosen))


def test_strip_is_cropped_without_resizing_all_of_it() -> None:
    # All of it at 224 x 224 would have 249 x 14.9 million pixels. Equal in one direction, so its middle is known.
    ramp = Image.fromarray(np.linspace(0, 255, 60000).round().astype(np.uint8)[None].repeat(1, 0)).convert("RGB")
    chosen = settings(mean=[0.0] * 3, std=[1.0] * 3)
    wide = preprocess(ramp, chosen)
    tall = preprocess(ramp.transpose(Image.Transpose.ROTATE_270), chosen)
    np.testing.assert_allclose(wide, 0.5, atol=2 / 255)
    np.testing.assert_allclose(tall, 0.5, atol=2 / 255)


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_an_image_that_is_large_between_its_axes_is_cropped_first(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Pillow resizes one axis after the other: what lies in between has one side of the image."""
    whole = Mock(wraps=Image.Image.resize)
    monkeypatch.setattr(Image.Image, "resize", lambda *arguments: whole(*arguments))
    for largest, boxed in ((4000 * 53, False), (4000 * 53 - 1, True)):
        monkeypatch.setattr("qvit.runtime.preprocess.LARGEST", largest)
        whole.reset_mock()
        preprocess(noise(*size), settings(input_size=[3, 48, 48], crop_mode="squash"))
        assert (len(whole.call_args.args) == 4) == boxed  # image, size, filter and box


def test_cut_before_resizing_is_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in CROP_MODES:
        for crop in ([48, 48], [31, 48]):
            chosen = settings(input_size=[3, *crop], mean=[0.0] * 3, std=[1.0] * 3, crop_mode=mode)
            whole = [preprocess(noise(*size), chosen) for size in SIZES]
            with monkeypatch.context() as patch:
                patch.setattr("qvit.runtime.preprocess.LARGEST", 0)
                cut = [preprocess(noise(*size), chosen) for size in SIZES]
            for first, second in zip(whole, cut, strict=True):
                steps = np.abs(first - second) * 255
                assert (steps < 1.01).mean() > 0.97  # a window may begin a pixel later: on noise that shows
                assert steps.max() < 20


def test_batch_stacks() -> None:
    chosen = settings(input_size=[3, 32, 32])
    images = [noise(40, 50), noise(31, 90)]
    batch = preprocess_batch(images, chosen)
    np.testing.assert_array_equal(batch, np.stack([preprocess(image, chosen) for image in images]))
    assert preprocess_batch([], chosen).shape == (0, 3, 32, 32)


def test_model_of_other_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 channels"):
        preprocess(noise(8, 8), settings(input_size=[4, 8, 8]))


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(CorruptImageError, match="The image .* floating-point"):
        preprocess(Image.new("F", (4, 4)), settings())


def test_image_without_pixels_is_refused() -> None:
    with pytest.raises(CorruptImageError, match="0 x 4 pixels"):
        preprocess(Image.new("RGB", (0, 4)), settings())
