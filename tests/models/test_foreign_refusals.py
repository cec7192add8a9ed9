"""Weights of others that cannot be used, and files that hold none: each is a sentence that says what was found."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreign_weights import ARGS, EXPECTED, VIT, refusal, trained
from qvit.errors import CheckpointError, ConfigError, QvitError
from qvit.models.float_models import load_float
from qvit.models.spec import describe


def test_what_is_missing_is_described_with_what_was_found(
    tmp_path: Path,
) -> None:
    weights = trained().state_dict()
    del weights["blocks.1.mlp.fc1.weight"]
    torch.save({"arch": "vit_small_patch16_224", "state_dict": weights}, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", EXPECTED)
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
def test_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert re.search(sentence, refusal(tmp_path / "w.pth", EXPECTED))


def test_models_of_others_are_recognised(
    tmp_path: Path,
) -> None:
    names = {
        "torchvision's names": ["conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"],
        "give the folder with its config.json": ["vit.embeddings.patch_embeddings.projection.weight"],
        "give the checkpoint that it was exported from": ["patch_embed.proj.codes", "head.scale"],
    }
    for sentence, entries in names.items():
        torch.save({name: torch.zeros(2) for name in entries}, tmp_path / "w.pth")
        assert sentence in refusal(tmp_path / "w.pth", EXPECTED)


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
def test_another_model_is_refused_by_what_differs(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    torch.save(trained(**changes).state_dict(), tmp_path / "w.pth")
    assert re.search(sentence, refusal(tmp_path / "w.pth", EXPECTED))


def test_distilled_weights_do_not_pass_for_others(
    tmp_path: Path,
) -> None:
    torch.save(trained("deit_tiny_distilled_patch16_224").state_dict(), tmp_path / "w.pth")
    assert re.search("dist_token.* is more than the model has|pos_embed", refusal(tmp_path / "w.pth", EXPECTED))


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
    tmp_path: Path, name: str, spoil: Callable[[Tensor], Any], why: str
) -> None:
    weights: dict[str, Any] = dict(trained().state_dict())
    weights[name] = spoil(weights[name])
    torch.save({"model": weights}, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", EXPECTED)
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
def test_file_that_is_none_is_described(tmp_path: Path, kind: str) -> None:
    write, sentence = FILES[kind]
    path = tmp_path / "w.pth"
    write(path)
    text = refusal(path, EXPECTED)
    assert text.startswith(f"{path} ")
    assert sentence in text
    (tmp_path / "w.safetensors").write_bytes(path.read_bytes())
    refusal(tmp_path / "w.safetensors", EXPECTED)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_file_is_a_sentence(tmp_path_factory: Any, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save({"model": trained().state_dict(), "args": argparse.Namespace(lr=1)}, buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        load_float(path, EXPECTED, lambda sentence: None)
    except QvitError as error:
        assert str(error).isprintable()  # noqa: PT017
        assert len(str(error)) < 600  # noqa: PT017


def test_folder_that_is_none_says_what_to_give(
    tmp_path: Path,
) -> None:
    assert "expected model.safetensors or pytorch_model.bin" in refusal(tmp_path, EXPECTED)
    (tmp_path / "best.pt").touch()
    assert f"give {tmp_path / 'best.pt'}" in refusal(tmp_path, EXPECTED)


def test_whole_model_is_not_built_and_says_what_to_save(
    tmp_path: Path,
) -> None:
    torch.save({"model": trained()}, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth", EXPECTED)
    assert "a whole object of the class 'timm.models.vision_transformer.VisionTransformer'" in text
    assert "save its state_dict()" in text


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.nonsense", "deit_tiny_patch16_224.fb_in1"])
def test_unknown_tag_names_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no pretrained weights for {name}: it has {name.partition('.')[0]}\."):
        load_float(name, EXPECTED, print)


def test_pretrained_weights_with_a_nan_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def from_timm(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        model = create(name, **arguments)
        if pretrained:
            with torch.no_grad():
                model.norm.weight[0] = float("nan")
        return model

    monkeypatch.setattr(timm, "create_model", from_timm)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds a NaN or an infinity"):
        load_float("vit_tiny_patch16_224.augreg_in21k_ft_in1k", EXPECTED, print)
