"""Teachers that transformers saved, of other families than the plain ViT, against transformers itself. No network."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from commands import run
from qvit import QuantConfig, quantize
from qvit.errors import CheckpointError, UnsupportedModelError
from qvit.models.float_models import load_float
from qvit.models.spec import ModelSpec, create_model, describe
from qvit.models.transformers_families import CONVERSIONS

CLASSES = ["a", "b", "c"]
PLAIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
}
MLP = {"intermediate_size": 60}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 3}),
    "swin_features": ("SwinModel", "SwinConfig", {**SWIN, "qkv_bias": False, "mlp_ratio": 2.5}),
    "beit": ("BeitForImageClassification", "BeitConfig", {**PLAIN, **MLP, "use_relative_position_bias": True}),
    "beit_shared_bias": (
        "BeitForImageClassification",
        "BeitConfig",
        {**PLAIN, **MLP, "use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**PLAIN, "mlp_ratio": 2}),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", {**PLAIN, "use_swiglu_ffn": True}),
    "dinov2_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**PLAIN, "mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {**PLAIN, **MLP}),
    "clip_projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**PLAIN, **MLP, "hidden_act": "gelu"}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {**PLAIN, **MLP}),
}


@pytest.fixture
def expected() -> ModelSpec:
    return describe("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4}, CLASSES, {})


def saved(folder: Path, model: str) -> Any:
    """Return a small model of weights that matter, saved in ``folder``."""
    name, config, arguments = MODELS[model]
    original = getattr(hf, name)(getattr(hf, config)(**arguments)).eval()
    with torch.no_grad():
        for key, parameter in original.named_parameters():
            if "norm" not in key:
                parameter.normal_(std=0.3)
    original.save_pretrained(folder)
    return original


@pytest.mark.parametrize("model", MODELS)
def test_transformers_model_gives_the_same_output(tmp_path: Path, expected: ModelSpec, model: str) -> None:
    original = saved(tmp_path, model)
    side = MODELS[model][2]["image_size"]
    expected.preprocessing["input_size"] = [3, side, side]
    loaded, spec = load_float(tmp_path, expected, print)
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        found, wanted = loaded(images), original(pixel_values=images)
        if model == "clip_projection":
            wanted = original.vision_model(images)
        wanted = wanted.logits if hasattr(wanted, "logits") else wanted.pooler_output
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)
    assert spec.classes == (CLASSES if MODELS[model][0].endswith("Classification") else [])
    quantize(loaded, QuantConfig())


def preprocessed(folder: Path, **settings: Any) -> None:
    content = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


CROPS = {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}


@pytest.mark.parametrize("model", ["dinov2", "dinov2_registers"])
@pytest.mark.parametrize("settings", [CROPS, {"size": {"height": 24, "width": 20}}])
def test_dinov2_takes_images_as_its_processor_makes_them(tmp_path: Path, model: str, settings: dict[str, Any]) -> None:
    original = saved(tmp_path, model)
    preprocessed(tmp_path, **settings)
    said: list[str] = []
    loaded, spec = load_float(tmp_path, None, said.append)
    size = [8, 8] if settings is CROPS else [24, 20]
    assert spec.preprocessing["input_size"] == [3, *size]
    assert f"resampled from images of 16 x 16 pixels to the {size[0]} x {size[1]} of its preprocessor." in said[0]
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), original(images).pooler_output, atol=1e-5, rtol=1e-4)
    assert tuple(create_model(spec).pos_embed.shape) == tuple(loaded.pos_embed.shape)


@pytest.mark.parametrize("model", ["swin", "beit", "clip", "siglip"])
def test_model_whose_processor_makes_images_of_another_size_is_refused(tmp_path: Path, model: str) -> None:
    saved(tmp_path, model)
    preprocessed(tmp_path, **CROPS)
    with pytest.raises(
        UnsupportedModelError, match=r"makes images of 8 x 8 pixels and the model takes (16 x 16|32 x 32)"
    ):
        load_float(tmp_path, None, print)


def test_siglip_classifier_pools_by_the_mean(tmp_path: Path, expected: ModelSpec) -> None:
    text = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = hf.SiglipConfig(vision_config={**PLAIN, **MLP}, text_config=text, num_labels=3)
    original = hf.SiglipForImageClassification(config).eval()
    original.save_pretrained(tmp_path)
    loaded, spec = load_float(tmp_path, expected, print)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), original(images).logits, atol=1e-5, rtol=1e-4)
    assert spec.classes == CLASSES


def test_dinov2_that_classifies_by_both_is_refused(tmp_path: Path, expected: ModelSpec) -> None:
    hf.Dinov2ForImageClassification(hf.Dinov2Config(**PLAIN, mlp_ratio=2)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="classifies by class token and patches"):
        load_float(tmp_path, expected, print)


def test_weights_that_are_not_what_the_configuration_says_are_refused(tmp_path: Path, expected: ModelSpec) -> None:
    saved(tmp_path, "siglip")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("siglip_vision_model", "clip_vision_model").replace("1e-06", "1e-05"))
    with pytest.raises(CheckpointError, match="does not hold what its config.json says: 'cls_token' is absent"):
        load_float(tmp_path, expected, print)


def test_what_is_read_is_named_where_people_look(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(UnsupportedModelError) as refused:
        load_float(tmp_path, None, print)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for text in (run("train", "--help").out, readme, str(refused.value), load_float.__doc__):
        words = set(re.findall(r"\w+", text.lower()))
        assert {kind.split("_")[0] for kind in ("vit", "deit", *CONVERSIONS)} <= words
