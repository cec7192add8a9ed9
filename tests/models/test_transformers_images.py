"""Settings of transformers' image processors, against the processors themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from qvit.errors import ConfigError, QvitError, UnsupportedModelError
from qvit.models.transformers_images import preprocessing_in
from qvit.runtime.preprocess import preprocess

EDGES = {"height": 16, "width": 16}
DEFAULTS = {"interpolation": "bicubic", "mean": [0.4] * 3, "std": [0.2] * 3}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {"size": EDGES}),
    "not normalized": ("ViT", {"size": EDGES, "do_normalize": False}),
    "not rescaled": ("ViT", {"size": EDGES, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
    "rescaled to 2": ("ViT", {"size": EDGES, "rescale_factor": 2 / 255}),
    "neither": ("ViT", {"size": EDGES, "do_rescale": False, "do_normalize": False}),
    "DeiT": ("DeiT", {"size": {"height": 24, "width": 24}, "crop_size": EDGES}),
    "CLIP": ("CLIP", {"size": {"shortest_edge": 20}, "crop_size": EDGES}),
    "CLIP whole": ("CLIP", {"size": {"shortest_edge": 16}, "crop_size": EDGES}),
    **{f"resample {number}": ("ViT", {"size": EDGES, "resample": number}) for number in range(6)},
}


def processor(kind: str) -> Any:
    """Return the class that works with Pillow, of two where transformers has two."""
    name = f"{kind}ImageProcessor"
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(40, 30), (17, 51)])
def test_images_are_what_transformers_makes_of_them(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    kind, settings = PROCESSORS[name]
    made = processor(kind)(**settings)
    made.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    expected = np.asarray(made(image, return_tensors="np")["pixel_values"][0])
    found = preprocess(image, {"input_size": [3, 16, 16], **DEFAULTS, **preprocessing_in(tmp_path, "here", 3)})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


def test_settings_beside_those_of_texts_are_read(tmp_path: Path) -> None:
    assert preprocessing_in(tmp_path, "here", 3) == {}
    content = {"image_processor": {"image_mean": [0.1] * 3, "image_std": [0.3] * 3, "size": EDGES, "resample": 5}}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    found = {"mean": [0.1] * 3, "std": [0.3] * 3, "interpolation": "hamming", "crop_pct": 1.0, "crop_mode": "squash"}
    assert preprocessing_in(tmp_path, "here", 3) == {**found, "input_size": [3, 16, 16]}


def test_timm_resizes_to_the_size_that_is_given(tmp_path: Path) -> None:
    for size in range(224, 300):
        settings = {"do_center_crop": True, "crop_size": 224, "size": size}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert int(224 / preprocessing_in(tmp_path, "here", 3)["crop_pct"]) == size


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"size": {"shortest_edge": 16}}, UnsupportedModelError, "its images keep their shape"),
        ({"size": {"longest_edge": 16}}, UnsupportedModelError, "qvit knows height and width, or shortest_edge"),
        ({"do_pad": True}, UnsupportedModelError, "do_pad"),
        ({"do_flip_channel_order": True}, UnsupportedModelError, "do_flip_channel_order"),
        ({"do_center_crop": True, "do_resize": False, "crop_size": 16}, UnsupportedModelError, "do_resize"),
        (
            {"do_center_crop": True, "size": 16, "crop_size": {"height": 16, "width": 8}},
            UnsupportedModelError,
            "square",
        ),
        ({"resample": 7}, ConfigError, "resample must be"),
        ({"rescale_factor": 0}, ConfigError, "rescale_factor must be"),
        ({"rescale_factor": 1}, ConfigError, "image_mean or image_std is absent"),
        ({"do_rescale": False, "image_mean": 1, "image_std": [1]}, ConfigError, "image_mean must be"),
    ],
)
def test_what_qvit_cannot_say_is_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[QvitError], reason: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(error, match=reason):
        preprocessing_in(tmp_path, "here", 3)
