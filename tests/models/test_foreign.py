"""Weights as timm's train.py, DeiT's main.py, Lightning and transformers write them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from foreign_weights import ARGS, EXPECTED, SWIN, VIT, load, refusal, trained
from qvit.errors import QvitError
from qvit.models.float_models import load_float
from qvit.models.spec import create_model, describe

# --- who wrote it -----------------------------------------------------------------------------------------------------


def timm_train(model: nn.Module) -> tuple[Any, str]:
    average = ModelEmaV3(trained(), decay=0.9)
    average.module.load_state_dict(model.state_dict())
    args = argparse.Namespace(model=VIT, lr=0.1, opt_betas=None, data_dir=Path("/data"), epochs=3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"epoch": 3, "arch": VIT, "state_dict": trained(depth=2).state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"version": 2, "args": args, "amp_scaler": {"scale": 65536.0}, "metric": np.float64(71.5)}
    return {**state, "state_dict_ema": average.module.state_dict()}, "the averaged weights are taken (state_dict_ema)"


def timm_without_average(model: nn.Module) -> tuple[Any, str]:
    return {"epoch": 3, "arch": VIT, "state_dict": model.state_dict(), "args": argparse.Namespace(model=VIT)}, ""


def deit_main(model: nn.Module) -> tuple[Any, str]:
    state = {"model": trained().state_dict(), "optimizer": {}, "lr_scheduler": {}, "epoch": 299}
    state |= {"scaler": {}, "args": argparse.Namespace(model=VIT, device="cuda", output_dir="")}
    return {**state, "model_ema": model.state_dict()}, "the averaged weights are taken (model_ema)"


def deit_without_average(model: nn.Module) -> tuple[Any, str]:
    return {"model": model.state_dict(), "model_ema": None, "args": argparse.Namespace(model=VIT)}, ""


LIGHTNING = "lightning_fabric.utilities.data"


def lightning(model: nn.Module) -> tuple[Any, str]:
    weights: dict[str, Any] = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights |= {"criterion.weight": torch.ones(3), "train_acc.total": torch.tensor(7)}
    hyper = type("AttributeDict", (dict,), {"__module__": LIGHTNING})
    parts = LIGHTNING.split(".")
    for end in range(1, len(parts) + 1):  # as if it were installed, while the file is written
        sys.modules[".".join(parts[:end])] = types.ModuleType(".".join(parts[:end]))
    sys.modules[LIGHTNING].AttributeDict = hyper  # type: ignore[attr-defined]
    return {
        "epoch": 9, "global_step": 100, "pytorch-lightning_version": "2.5.0", "state_dict": weights,
        "hyper_parameters": hyper(lr=0.1, root=Path("/data")), "hparams_name": "kwargs",
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.7)}},
        "optimizer_states": [{"state": defaultdict(dict, {0: {"step": 1}})}], "lr_schedulers": [], "loops": {},
    }, "what is no part of a vision transformer was left out: criterion.weight, train_acc.total"  # fmt: skip


def plain(model: nn.Module) -> tuple[Any, str]:
    return model.state_dict(), ""


def half(model: nn.Module) -> tuple[Any, str]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return {name: value.half() for name, value in model.state_dict().items()}, ""


WRITERS: list[Callable[[nn.Module], tuple[Any, str]]] = [
    timm_train, timm_without_average, deit_main, deit_without_average, lightning, plain, half,
]  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_as_others_write_it_is_taken(
    tmp_path: Path, images: Tensor, writer: Callable[[nn.Module], tuple[Any, str]], zipped: bool
) -> None:
    model = trained()
    content, sentence = writer(model)
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("lightning_fabric")]:
        del sys.modules[name]
    if not zipped and writer in (timm_train, lightning):  # whose classes only PyTorch's present files list
        assert "cannot" in refusal(path, EXPECTED) or "damaged" in refusal(path, EXPECTED)
        return
    loaded, said = load(path, EXPECTED)
    assert torch.equal(loaded(images), model(images))
    assert [line for line in said if sentence not in line] == []
    assert bool(said) == bool(sentence)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "backbone."]), max_size=5).map("".join),
    st.sampled_from(["", "state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"]),
    st.sampled_from(["", "state_dict", "model"]),
)
def test_prefixes_and_nesting_of_any_kind_are_taken_off(prefix: str, inside: str, outside: str) -> None:
    from qvit.models.foreign import adapted

    model = trained()
    content: Any = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    for key in (inside, outside):
        content = {key: content, "epoch": 1} if key else content
    said: list[str] = []
    weights = adapted(content, EXPECTED, "w.pth", said.append)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert said == [f"w.pth: the averaged weights are taken ({inside})."] * inside.endswith("ema")


def test_backbone_and_head_of_a_module_come_together(tmp_path: Path, images: Tensor) -> None:
    model = trained()
    weights = {f"model.{'' if name.startswith('head.') else 'backbone.'}{name}": value
               for name, value in model.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": weights}, tmp_path / "w.ckpt")
    loaded, _ = load(tmp_path / "w.ckpt", EXPECTED)
    assert torch.equal(loaded(images), model(images))


def test_two_models_in_one_file_are_not_mixed_up(
    tmp_path: Path,
) -> None:
    weights = {f"{prefix}{name}": value for prefix in ("", "module.") for name, value in trained().state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    assert "holds more than one model: 'cls_token' and 'module.cls_token'" in refusal(tmp_path / "w.pth", EXPECTED)


@pytest.mark.parametrize("name", [VIT, "deit_tiny_distilled_patch16_224"])
def test_position_embedding_of_another_image_size_is_resampled_and_said(tmp_path: Path, name: str) -> None:
    model = trained(name, img_size=24)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    spec = describe(name, {**ARGS, "img_size": [32, 24]}, ["a", "b", "c"], {})
    loaded, said = load(tmp_path / "w.pth", spec)
    prefix = 1 if name == VIT else 2
    assert said == [
        f"{tmp_path / 'w.pth'}: the position embedding was resampled from (1, {36 + prefix}, 8) to "
        f"(1, {48 + prefix}, 8), for images of 32 x 24 pixels."
    ]
    model.set_input_size((32, 24))  # type: ignore[operator]
    images = torch.randn(2, 3, 32, 24)
    torch.testing.assert_close(loaded(images), model(images))


def test_checkpoint_of_qvits_of_another_image_size_is_resampled_and_said(tmp_path: Path) -> None:
    from qvit.models.checkpoint import write_checkpoint

    model = trained()
    write_checkpoint(tmp_path / "best.pt", EXPECTED, model)
    other = describe(VIT, {**ARGS, "img_size": 24}, ["a", "b", "c"], {})
    said: list[str] = []
    loaded, loaded_spec = load_float(tmp_path / "best.pt", other, said.append)
    assert said == [
        f"{tmp_path / 'best.pt'}: the position embedding was resampled from images of 16 x 16 pixels to 24 x 24."
    ]
    assert (loaded_spec.name, loaded_spec.model_args, loaded_spec.preprocessing["input_size"]) == (
        VIT,
        other.model_args,
        [3, 24, 24],
    )
    model.set_input_size((24, 24))  # type: ignore[operator]
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(images), model(images))
    write_checkpoint(tmp_path / "again.pt", loaded_spec, loaded)
    assert torch.equal(load(tmp_path / "again.pt", other)[0](images), model(images))


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    from qvit.models.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "best.pt", EXPECTED, trained())
    grey = describe(VIT, {**ARGS, "in_chans": 1}, ["a", "b", "c"], {"mean": [0.5], "std": [0.5]})
    assert "takes images of 3 channels, the images have 1" in refusal(tmp_path / "best.pt", grey)


def test_swin_of_anyones_is_taken(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    model = trained(name)
    spec = describe(name, SWIN, ["a", "b", "c"], {})
    content = {"model": {f"module.{key}": value for key, value in model.state_dict().items()}}
    torch.save(content, tmp_path / "w.pth")
    loaded, said = load(tmp_path / "w.pth", spec)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), model(images))
    assert said == []
    wider = describe(name, {**SWIN, "window_size": 2}, ["a", "b", "c"], {})
    _, said = load(tmp_path / "w.pth", wider)
    assert len(said) == 1
    assert "the relative position bias was resampled from (49, 1) to (9, 1)" in said[0]


def test_layer_scales_of_deit_get_timms_names(tmp_path: Path, images: Tensor) -> None:
    model = trained(init_values=0.1)
    weights = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in model.state_dict().items()}
    assert any("gamma_1" in name for name in weights)
    torch.save({"model": weights}, tmp_path / "w.pth")
    loaded, _ = load(tmp_path / "w.pth", describe(VIT, {**ARGS, "init_values": 0.1}, ["a", "b", "c"], {}))
    assert torch.equal(loaded(images), model(images))


# --- transformers' and timm's folders ---------------------------------------------------------------------------------


def shards(folder: Path, weights: dict[str, Tensor], suffix: str, parts: int = 3) -> Path:
    """Write weights in several files with an index, as ``save_pretrained`` does for large models."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, places = list(weights), {}
    for number in range(parts):
        part = {name: weights[name].clone() for name in names[number::parts]}
        file = f"{stem}-{number + 1:05}-of-{parts:05}.{suffix}"
        places |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(OrderedDict(part), folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files_are_taken(tmp_path: Path, images: Tensor, suffix: str) -> None:
    model = trained()
    index = shards(tmp_path, model.state_dict(), suffix)
    assert torch.equal(load(index, EXPECTED)[0](images), model(images))
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": VIT, "num_classes": 3, "model_args": ARGS, "pretrained_cfg": {}})
    )
    assert torch.equal(load(tmp_path, EXPECTED)[0](images), model(images))


@pytest.mark.parametrize("way", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_folder_of_transformers_is_taken_however_its_weights_are_written(
    tmp_path: Path, images: Tensor, way: str
) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=3, layer_norm_eps=1e-6,
    )  # fmt: skip
    original = transformers.ViTForImageClassification(config).eval()
    original.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    if way != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        if way == "bin":
            torch.save(weights, tmp_path / "pytorch_model.bin")
        else:
            shards(tmp_path, weights, way.split()[1])
    loaded, _ = load(tmp_path, EXPECTED)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), original(images).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda places: places.update({"cls_token": "../secret.safetensors"}), "which is no file beside it"),
        (lambda places: places.update({"cls_token": "/etc/passwd"}), "which is no file beside it"),
        (lambda places: places.update({"cls_token": "absent.safetensors"}), "which is no file beside it"),
        (lambda places: places.update({"cls_token": 5}), "has no weight_map"),
        (lambda places: places.update({"more": "model-00001-of-00003.safetensors"}), "which none of its files holds"),
    ],
)
def test_index_that_lies_is_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"cls_token": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = shards(folder, trained().state_dict(), "safetensors")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    assert sentence in refusal(index, EXPECTED)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3, layer_norm_eps=1e-6,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    settings = {"size": 8, "crop_size": 8, "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


EDITED = {
    "config.json": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "model_type"),
        *("layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias", "id2label"),
    ),
    "preprocessor_config.json": ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample"),
}
NONSENSE = [None, 0, 3, 10**6, 1e300, "x", [1, 2], {"x": "y"}, True]


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in EDITED.items() for field in fields])
def test_edited_settings_of_transformers_are_a_sentence(saved: Path, name: str, field: str, tmp_path: Path) -> None:
    spec = describe(VIT, {**ARGS, "img_size": 8, "depth": 1, "mlp_ratio": 1}, ["a", "b", "c"], {})
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    load_float(folder, spec, print)
    original = json.loads((folder / name).read_text())
    refused = 0
    for value in NONSENSE:
        (folder / name).write_text(json.dumps({**original, field: value}))
        try:
            load_float(folder, spec, print)
        except QvitError as error:
            refused += 1
            assert str(error).isprintable()  # noqa: PT017
            assert len(str(error)) < 500  # noqa: PT017
    assert refused or field in ("do_center_crop", "resample")


def test_fixture_models_differ() -> None:
    """What the tests above compare is worth comparing."""
    images = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(trained()(images), trained()(images))
    assert create_model(describe(VIT, ARGS, ["a"], {})).num_classes == 1
