"""Teachers from a folder, from timm and from the Hub, against the library that they come from. No network."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from qvit.errors import CheckpointError, ConfigError, HubError, QvitError, UnsupportedModelError
from qvit.models import float_models
from qvit.models.spec import ModelSpec, describe
from qvit.models.transformers_vit import class_names

CLASSES = ["a", "b", "c", "d", "e"]
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 60,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16)


def load(source: Any, expected: ModelSpec, *, quantized: bool = False) -> tuple[Any, ModelSpec]:
    """Return a model and its spec, of which there is nothing to tell."""
    said: list[str] = []
    model, spec = float_models.load_float(source, expected, said.append, quantized=quantized)
    assert not said
    return model, spec


@pytest.fixture
def expected() -> ModelSpec:
    return describe("vit_tiny_patch16_224", ARGS, CLASSES, {})


def spread(model: torch.nn.Module) -> None:
    """Give weights the size that trained ones have: fresh ones hardly tell one computation from another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:
                parameter.normal_(std=0.3)


def saved(folder: Path, kind: str = "ViT", **changes: Any) -> Any:
    """Return a small transformers classifier of weights that matter, saved in ``folder``."""
    name = {"ViT": "ViT", "DeiT": "DeiT", "DeiT, two heads": "DeiT"}[kind]
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    suffix = "WithTeacher" if kind == "DeiT, two heads" else ""
    model = getattr(transformers, f"{name}ForImageClassification{suffix}")(config).eval()
    spread(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "DeiT, two heads"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False},
        {"hidden_act": "quick_gelu"},
        {"layer_norm_eps": 1e-12},
        {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24},
    ],
)
def test_transformers_model_gives_the_same_logits(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    original = saved(tmp_path, kind, **changes)
    side = changes.get("image_size", 16)
    images = torch.randn(3, 3, side, side)
    expected = describe("vit_tiny_patch16_224", {**ARGS, "img_size": side}, CLASSES, {})
    loaded, spec = load(tmp_path, expected)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), original(images).logits, atol=2e-4, rtol=1e-4)
    assert spec.classes == CLASSES  # it does not name its own
    assert spec.preprocessing["input_size"] == [3, side, side]


def test_a_student_can_start_from_the_same_architecture(tmp_path: Path, expected: ModelSpec) -> None:
    saved(tmp_path / "same")
    _, spec = load(tmp_path / "same", expected)
    assert (spec.name, spec.model_args) == (expected.name, expected.model_args)
    saved(tmp_path / "deeper", num_hidden_layers=3)
    _, spec = load(tmp_path / "deeper", expected)
    assert spec.model_args["depth"] == 3
    saved(tmp_path / "heads", num_attention_heads=4)
    _, spec = load(tmp_path / "heads", expected)
    assert spec.model_args["num_heads"] == 4


def test_spec_builds_the_same_model_again(tmp_path: Path, expected: ModelSpec, images: torch.Tensor) -> None:
    from qvit.models.checkpoint import load_checkpoint, write_checkpoint

    saved(tmp_path, "DeiT", num_attention_heads=4, hidden_act="gelu_new")
    model, spec = load(tmp_path, expected)
    write_checkpoint(tmp_path / "float.pt", spec, model)
    again, _ = load_checkpoint(tmp_path / "float.pt")
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "size": 16, "resample": 2},
            {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "crop_mode": "squash", "interpolation": "bilinear"},
        ),
        (
            {"do_center_crop": True, "size": 20, "crop_size": {"height": 16, "width": 16}, "resample": 3},
            {"crop_pct": 0.8, "crop_mode": "center", "interpolation": "bicubic"},
        ),
    ],
)  # fmt: skip
def test_preprocessing_is_its_own(
    tmp_path: Path, expected: ModelSpec, config: dict[str, Any], found: dict[str, Any]
) -> None:
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    _, spec = load(tmp_path, expected)
    assert {name: spec.preprocessing[name] for name in found} == found


def test_classes_of_imagenet_are_called_like_its_folders() -> None:
    info = ImageNetInfo("imagenet-1k")
    config = {"id2label": {str(i): text for i, text in enumerate(info.label_descriptions())}}
    assert class_names(config, CLASSES) == info.label_names()
    assert class_names({"id2label": {"1": "dog", "0": "cat"}}, CLASSES) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"hidden_act": "tanh"}, "activation 'tanh'"), ({"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001")],
)
def test_what_timm_cannot_represent_is_refused(
    tmp_path: Path, expected: ModelSpec, changes: dict[str, Any], named: str
) -> None:
    saved(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        load(tmp_path, expected)


def test_model_without_a_classifier_is_refused(tmp_path: Path, expected: ModelSpec) -> None:
    transformers.ViTModel(transformers.ViTConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        load(tmp_path, expected)


def test_another_kind_of_model_is_refused(tmp_path: Path, expected: ModelSpec) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        load(tmp_path, expected)


@pytest.mark.parametrize(
    "damage", ["no config", "no weights", "cut weights", "no JSON", "other depth", "a weight less"]
)
def test_damaged_folder_is_named(tmp_path: Path, expected: ModelSpec, damage: str) -> None:
    folder = tmp_path / "model"
    saved(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif damage == "no JSON":
        config.write_text("{")
    elif damage == "other depth":
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    else:
        tensors = load_file(weights)
        del tensors["vit.encoder.layer.1.attention.attention.key.weight"]
        save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=str(folder)):
        load(folder, expected)


def hub_model(folder: Path, **config: Any) -> torch.nn.Module:
    """Return a small timm model, saved in ``folder`` as timm uploads it."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS).eval()
    spread(model)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    save_for_hf(model, folder, model_config=config, model_args=dict(ARGS), safe_serialization=True)
    return model


@pytest.mark.parametrize("source", ["hf-hub:someone/small", "hf-hub:someone/small@v1"])
def test_timm_model_of_the_hub(
    tmp_path: Path, expected: ModelSpec, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    original = hub_model(tmp_path / "snapshot", label_names=["v", "w", "x", "y", "z"])
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded, spec = load(source, expected)
    assert asked == [("someone/small", "v1" if "@" in source else None)]
    assert torch.equal(loaded(images), original(images))
    assert spec.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert spec.classes == ["v", "w", "x", "y", "z"]
    assert (spec.name, spec.model_args) == (expected.name, expected.model_args)


def test_pretrained_timm_model_by_its_name(
    tmp_path: Path, expected: ModelSpec, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hub_model(tmp_path)
    create = timm.create_model

    def from_file(name: str, **kwargs: Any) -> Any:
        # timm's own loading, of a file in place of a download.
        if not kwargs.get("pretrained"):
            return create(name, **kwargs)
        overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5, "input_size": (3, 16, 16)}
        return create(name, num_classes=5, pretrained_cfg_overlay=overlay, **kwargs)

    monkeypatch.setattr(float_models.timm, "create_model", from_file)
    said: list[str] = []
    loaded, spec = float_models.load_float("vit_tiny_patch16_224.augreg_in21k_ft_in1k", expected, said.append)
    assert torch.equal(loaded(images), original(images))
    assert said == [
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k: the position embedding was resampled from 224 x 224 to 16 x 16 "
        "pixels.",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k: the patch embedding was resampled from 16 x 16 to 4 x 4 pixels.",
    ]
    assert (spec.name, spec.model_args) == (expected.name, expected.model_args)


def test_timm_model_without_pretrained_weights_says_so(expected: ModelSpec) -> None:
    name = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    with pytest.raises(ConfigError, match=f"no pretrained weights for {name}"):
        load(name, expected)


def test_unreachable_hub_is_one_sentence(expected: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise ConnectionError("cannot connect\nwith details")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(HubError, match=r"does not hand out someone/small: cannot connect\.$"):
        load("hf-hub:someone/small", expected)


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:a/b/c", "hf-hub:../../etc"])
def test_name_that_is_none_of_the_hubs_is_refused(expected: ModelSpec, name: str) -> None:
    with pytest.raises(HubError):
        load(name, expected)


def test_neither_file_nor_model_is_named(expected: ModelSpec) -> None:
    with pytest.raises(QvitError, match="no file nothing-of-the-kind"):
        load("nothing-of-the-kind", expected)
