"""Weights as timm's train.py, DeiT's main.py, Lightning and transformers write them, and files that hold none."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import shutil
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from qvit.errors import CheckpointError, ConfigError, QvitError
from qvit.models.float_models import load_float
from qvit.models.spec import ModelSpec, create_model, describe

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}


def trained(name: str = VIT, **changes: Any) -> nn.Module:
    """Return a small float model whose weights are of the size that trained ones have."""
    model = timm.create_model(name, num_classes=3, **{**(SWIN if "swin" in name else ARGS), **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def expected() -> ModelSpec:
    return describe(VIT, ARGS, ["a", "b", "c"], {})


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def load(path: Path, spec: ModelSpec) -> tuple[Any, list[str]]:
    said: list[str] = []
    model, _ = load_float(path, spec, said.append)
    return model, said


def refusal(path: Path, spec: ModelSpec) -> str:
    """Return the sentence in which a file is refused: one line, short, and no escape sequence."""
    with pytest.raises(QvitError) as caught:
        load_float(path, spec, print)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    assert "torch.load" not in text
    assert "weights_only" not in text
    return text


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
    tmp_path: Path, expected: ModelSpec, images: Tensor, writer: Callable[[nn.Module], tuple[Any, str]], zipped: bool
) -> None:
    model = trained()
    content, sentence = writer(model)
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("lightning_fabric")]:
        del sys.modules[name]
    if not zipped and writer in (timm_train, lightning):  # whose classes only PyTorch's present files list
        assert "cannot" in refusal(path, expected) or "damaged" in refusal(path, expected)
        return
    loaded, said = load(path, expected)
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
    weights = adapted(content, describe(VIT, ARGS, ["a", "b", "c"], {}), "w.pth", said.append)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert said == [f"w.pth: the averaged weights are taken ({inside})."] * inside.endswith("ema")


def test_backbone_and_head_of_a_module_come_together(tmp_path: Path, expected: ModelSpec, images: Tensor) -> None:
    model = trained()
    weights = {f"model.{'' if name.startswith('head.') else 'backbone.'}{name}": value
               for name, value in model.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": weights}, tmp_path / "w.ckpt")
    loaded, _ = load(tmp_path / "w.ckpt", expected)
    assert torch.equal(loaded(images), model(images))


def test_two_models_in_one_file_are_not_mixed_up(tmp_path: Path, expected: ModelSpec) -> None:
    weights = {f"{prefix}{name}": value for prefix in ("", "module.") for name, value in trained().state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    assert "holds more than one model: 'cls_token' and 'module.cls_token'" in refusal(tmp_path / "w.pth", expected)


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

    spec = describe(VIT, ARGS, ["a", "b", "c"], {})
    model = trained()
    write_checkpoint(tmp_path / "best.pt", spec, model)
    expected = describe(VIT, {**ARGS, "img_size": 24}, ["a", "b", "c"], {})
    said: list[str] = []
    loaded, loaded_spec = load_float(tmp_path / "best.pt", expected, said.append)
    assert said == [
        f"{tmp_path / 'best.pt'}: the position embedding was resampled from images of 16 x 16 pixels to 24 x 24."
    ]
    assert (loaded_spec.name, loaded_spec.model_args, loaded_spec.preprocessing["input_size"]) == (
        VIT,
        expected.model_args,
        [3, 24, 24],
    )
    model.set_input_size((24, 24))  # type: ignore[operator]
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(images), model(images))
    write_checkpoint(tmp_path / "again.pt", loaded_spec, loaded)
    assert torch.equal(load(tmp_path / "again.pt", expected)[0](images), model(images))


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    from qvit.models.checkpoint import write_checkpoint

    spec = describe(VIT, ARGS, ["a", "b", "c"], {})
    write_checkpoint(tmp_path / "best.pt", spec, trained())
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
def test_weights_in_several_files_are_taken(tmp_path: Path, expected: ModelSpec, images: Tensor, suffix: str) -> None:
    model = trained()
    index = shards(tmp_path, model.state_dict(), suffix)
    assert torch.equal(load(index, expected)[0](images), model(images))
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": VIT, "num_classes": 3, "model_args": ARGS, "pretrained_cfg": {}})
    )
    assert torch.equal(load(tmp_path, expected)[0](images), model(images))


@pytest.mark.parametrize("way", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_folder_of_transformers_is_taken_however_its_weights_are_written(
    tmp_path: Path, expected: ModelSpec, images: Tensor, way: str
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
    loaded, _ = load(tmp_path, expected)
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
def test_index_that_lies_is_refused(tmp_path: Path, expected: ModelSpec, change: Any, sentence: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"cls_token": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = shards(folder, trained().state_dict(), "safetensors")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    assert sentence in refusal(index, expected)


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


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_what_is_missing_is_described_with_what_was_found(tmp_path: Path, expected: ModelSpec) -> None:
    weights = trained().state_dict()
    del weights["blocks.1.mlp.fc1.weight"]
    torch.save({"arch": "vit_small_patch16_224", "state_dict": weights}, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", expected)
    assert "blocks.1.mlp.fc1.weight' is absent; found cls_token, pos_embed" in text
    assert "it says that it is of 'vit_small_patch16_224'" in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"epoch": 3, "loss": 0.1}, "expected a state dict, by itself or as .*model_ema.*; found epoch, loss"),
        ([1, 2], r"found \[1, 2\]"),
        ("text", "found 'text'"),
        ({}, "found nothing"),
        (None, "found None"),
        ({"state_dict": {"a": "b"}}, "holds no weights"),
        ({"model": {"state_dict": {"model": {}}}}, "holds no weights"),
    ],
)
def test_file_without_weights_says_what_it_holds(
    tmp_path: Path, expected: ModelSpec, content: Any, sentence: str
) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert re.search(sentence, refusal(tmp_path / "w.pth", expected))


def test_models_of_others_are_recognised(tmp_path: Path, expected: ModelSpec) -> None:
    names = {
        "torchvision's names": ["conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"],
        "give the folder with its config.json": ["vit.embeddings.patch_embeddings.projection.weight"],
        "give the checkpoint that it was exported from": ["patch_embed.proj.codes", "head.scale"],
    }
    for sentence, entries in names.items():
        torch.save({name: torch.zeros(2) for name in entries}, tmp_path / "w.pth")
        assert sentence in refusal(tmp_path / "w.pth", expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": 3}, "'blocks.2.norm1.weight' is more than the model has; found cls_token"),
        ({"depth": 1}, "'blocks.1.norm1.weight' is absent; found cls_token"),
        ({"embed_dim": 16}, r"cls_token has shape \(1, 1, 16\), the model needs \(1, 1, 8\)"),
        ({"patch_size": 2}, "its patches have 2 x 2 pixels, the model's 4 x 4"),
        ({"in_chans": 1}, r"patch_embed.proj.weight has shape \(8, 1, 4, 4\)"),
        ({"reg_tokens": 2}, "'reg_token' is more than the model has"),
        ({"class_token": False, "global_pool": "avg"}, "'cls_token' is absent"),
        ({"qk_norm": True}, r"'blocks.0.attn.q_norm.weight' is more than the model has"),
    ],
)
def test_another_model_is_refused_by_what_differs(
    tmp_path: Path, expected: ModelSpec, changes: dict[str, Any], sentence: str
) -> None:
    torch.save(trained(**changes).state_dict(), tmp_path / "w.pth")
    assert re.search(sentence, refusal(tmp_path / "w.pth", expected))


def test_distilled_weights_do_not_pass_for_others(tmp_path: Path, expected: ModelSpec) -> None:
    torch.save(trained("deit_tiny_distilled_patch16_224").state_dict(), tmp_path / "w.pth")
    assert re.search("dist_token.* is more than the model has|pos_embed", refusal(tmp_path / "w.pth", expected))


def test_other_classes_are_told(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", describe(VIT, ARGS, ["a", "b"], {}))
    assert "tells 3 classes apart and the data has 2: give a model of these classes" in text


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda v: v * float("nan"), "holds a NaN or an infinity"),
        (lambda v: v.double() * 1e300, "holds a NaN or an infinity"),
        (lambda v: v.masked_fill(v == v.max(), float("inf")), "holds a NaN or an infinity"),
        (lambda v: v.to(torch.complex64), "is complex"),
        (lambda v: v.to_sparse(), "is sparse"),
        (lambda v: v.to("meta"), "is on the meta device"),
        (lambda v: v.to(torch.int64), "is of type int64, the model needs float32"),
        (lambda v: v > 0, "is of type bool"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "quantized tensors"),
        (lambda v: torch.zeros(1).expand(v.shape), "repeats fewer values"),
        (lambda v: v[:1], "has shape"),
        (lambda v: v.tolist(), "and no tensor"),
        (lambda v: None, "is None and no tensor"),
    ],
)
@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "norm.bias"])
def test_weight_that_is_none_is_refused_by_name(
    tmp_path: Path, expected: ModelSpec, name: str, spoil: Callable[[Tensor], Any], why: str
) -> None:
    weights: dict[str, Any] = dict(trained().state_dict())
    weights[name] = spoil(weights[name])
    torch.save({"model": weights}, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", expected)
    assert name in text
    assert why in text


# --- files that are none ----------------------------------------------------------------------------------------------


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "x")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.touch(), "is empty"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html>"), "is a web page"),
    "json": (lambda path: path.write_text('{"a": 1}'), "is JSON"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n"), "HDF5"),
    "text": (lambda path: path.write_text("hello"), "was damaged, or is no file of PyTorch's"),
    "noise": (lambda path: path.write_bytes(os.urandom(300)), "damaged"),
    "cut": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)), "was cut short or damaged"),
    "torchscript": (torchscript, "TorchScript"),
    "numpy": (lambda path: archive(path, "w/a.npy"), "NumPy"),
    "zip": (lambda path: archive(path, "a.txt"), "is a zip archive of something else"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "damaged"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", FILES)
def test_file_that_is_none_is_described(tmp_path: Path, expected: ModelSpec, kind: str) -> None:
    write, sentence = FILES[kind]
    path = tmp_path / "w.pth"
    write(path)
    text = refusal(path, expected)
    assert text.startswith(f"{path} ")
    assert sentence in text
    (tmp_path / "w.safetensors").write_bytes(path.read_bytes())
    refusal(tmp_path / "w.safetensors", expected)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_file_is_a_sentence(tmp_path_factory: Any, data: st.DataObject) -> None:
    spec = describe(VIT, ARGS, ["a", "b", "c"], {})
    buffer = io.BytesIO()
    torch.save({"model": trained().state_dict(), "args": argparse.Namespace(lr=1)}, buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        load_float(path, spec, lambda sentence: None)
    except QvitError as error:
        assert str(error).isprintable()  # noqa: PT017
        assert len(str(error)) < 600  # noqa: PT017


def test_folder_that_is_none_says_what_to_give(tmp_path: Path, expected: ModelSpec) -> None:
    assert "expected model.safetensors or pytorch_model.bin" in refusal(tmp_path, expected)
    (tmp_path / "best.pt").touch()
    assert f"give {tmp_path / 'best.pt'}" in refusal(tmp_path, expected)


def test_whole_model_is_not_built_and_says_what_to_save(tmp_path: Path, expected: ModelSpec) -> None:
    torch.save({"model": trained()}, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", expected)
    assert "a whole object of the class 'timm.models.vision_transformer.VisionTransformer'" in text
    assert "save its state_dict()" in text


# --- code in files ----------------------------------------------------------------------------------------------------


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


def malicious(target: Path) -> dict[str, Any]:
    import importlib
    import subprocess

    made = f"open({str(target)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {target}"),
        "subprocess": Calls(subprocess.getoutput, f"touch {target}"),
        "eval": Calls(eval, made),
        "exec": Calls(exec, made),
        "open": Calls(open, str(target), "w"),
        "touch": Calls(Path.touch, target),
        "import": Calls(importlib.import_module, "antigravity"),
        "numpy": Calls(np.fromfile, str(target)),
        "torch.load": Calls(torch.load, str(target)),
        "nested": Calls(getattr, Calls(importlib.import_module, "os"), "system"),
        "partial": Calls(__import__("functools").partial, eval, made),
    }


@pytest.mark.parametrize("kind", malicious(Path("x")))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["args", "weight", "all"])
def test_no_code_in_a_file_is_run(tmp_path: Path, expected: ModelSpec, kind: str, zipped: bool, where: str) -> None:
    target = tmp_path / "made"
    evil = malicious(target)[kind]
    weights: dict[str, Any] = dict(trained().state_dict())
    content: Any = {"state_dict": weights, "args": argparse.Namespace(lr=evil) if where == "args" else None}
    if where == "weight":
        weights["head.weight"] = evil
    torch.save(evil if where == "all" else content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    before = set(sys.modules)
    if zipped and where == "args" and kind not in ("os.system", "touch"):  # which needs two calls
        load(tmp_path / "evil.pth", expected)  # what stands beside the weights is never looked at
    else:
        refusal(tmp_path / "evil.pth", expected)
    assert not target.exists()
    assert "antigravity" not in set(sys.modules) - before


def test_call_into_the_system_is_named(tmp_path: Path, expected: ModelSpec) -> None:
    torch.save({"model": Calls(os.system, "true")}, tmp_path / "evil.pth")
    text = refusal(tmp_path / "evil.pth", expected)
    assert f"holds a call of '{os.name}.system': qvit runs no code of a file" in text


def test_too_many_classes_are_refused(tmp_path: Path, expected: ModelSpec) -> None:
    pickled = b"\x80\x02(" + b"".join(b"cmodule%d\nname\n" % n for n in range(101)) + b"t."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as file:
        file.writestr("w/data.pkl", pickled)
        file.writestr("w/version", "3\n")
    assert "names 101 classes of other programs, the limit is 100" in refusal(tmp_path / "w.pth", expected)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.nonsense", "deit_tiny_patch16_224.fb_in1"])
def test_unknown_tag_names_those_that_there_are(expected: ModelSpec, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no pretrained weights for {name}: it has {name.partition('.')[0]}\."):
        load_float(name, expected, print)


def test_pretrained_weights_with_a_nan_are_refused(expected: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def from_timm(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        model = create(name, **arguments)
        if pretrained:
            with torch.no_grad():
                model.norm.weight[0] = float("nan")
        return model

    monkeypatch.setattr(timm, "create_model", from_timm)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds a NaN or an infinity"):
        load_float("vit_tiny_patch16_224.augreg_in21k_ft_in1k", expected, print)


def test_fixture_models_differ() -> None:
    """What the tests above compare is worth comparing."""
    images = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(trained()(images), trained()(images))
    assert create_model(describe(VIT, ARGS, ["a"], {})).num_classes == 1
