from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo
from timm.layers import GatedMlp, GluMlp, SimpleNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import qvit
from commands import run
from members import (
    CLASSES,
    MEMBERS,
    SIZES,
    VIT,
    check_same,
    images_for,
    packed,
    preprocessing,
    student_of,
)
from qvit import QuantConfig, export, quantize
from qvit.errors import CheckpointError, ConfigError, PackedFileError, UncalibratedError, UnsupportedModelError
from qvit.exporting.packed import export_checkpoint
from qvit.format.branches import Residual
from qvit.format.packed import read_packed
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe
from qvit.nn.quantizer import Quantizer


@pytest.mark.parametrize(("bits", "rectifier"), [(8, "token"), (4, "head"), (3, None)])
@pytest.mark.parametrize("member", MEMBERS)
def test_exported_member_computes_what_the_fake_quantized_model_does(
    make_model, tmp_path: Path, member: str, bits: int, rectifier: Any
) -> None:
    name, kwargs = MEMBERS[member]
    images = images_for(kwargs.get("in_chans", 3), SIZES.get(member, (16, 16)))
    student = student_of(make_model(name, **kwargs), images, QuantConfig(bits, bits, rectifier))
    check_same(student, packed(student, tmp_path / "m.safetensors", images), images)


def test_every_layer_and_operand_keeps_its_own_bits(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    overrides: dict[str, int | tuple[int, int]] = {
        "patch_embed.proj": (5, 6),
        "blocks.0.attn.qkv": (2, 7),
        "blocks.0.attn.query_quantizer": 3,
        "blocks.0.attn.attention_quantizer": 8,
        "blocks.1.mlp.fc2": (6, 5),
        "head": (7, 3),
    }
    student = student_of(vit, images, QuantConfig(3, 4, "head", overrides))
    model = packed(student, tmp_path / "m.safetensors", images)
    bits = model.program.bits()
    assert bits["patch_embed.proj"] == (5, 6)
    assert bits["blocks.0.attn.qkv"] == (2, 7)
    assert bits["blocks.0.attn.query"] == (3, 3)
    assert bits["blocks.0.attn.key"] == (4, 4)
    assert bits["blocks.0.attn.map"] == (8, 8)
    assert bits["blocks.1.mlp.fc1"] == (3, 4)
    assert bits["blocks.1.mlp.fc2"] == (6, 5)
    assert bits["head"] == (7, 3)
    check_same(student, model, images)


def test_weight_codes_and_scales_are_the_quantizers(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    student = student_of(vit, images, QuantConfig(3, 3))
    model = packed(student, tmp_path / "m.safetensors", images)
    for name in ("blocks.1.mlp.fc1", "head", "patch_embed.proj"):
        layer, quantizer = model.layer(model.program.layers()[name]), student.get_submodule(f"{name}.weight_quantizer")
        weight = student.get_submodule(name).weight
        np.testing.assert_array_equal(layer.codes, quantizer.codes(weight).flatten(1).numpy())
        np.testing.assert_array_equal(layer.scale, quantizer.scale.detach().flatten().numpy())


def test_training_mode_exports_the_model_of_evaluation(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    student = student_of(vit, images, QuantConfig())
    packed(student, tmp_path / "eval.safetensors", images)
    packed(student.train(), tmp_path / "train.safetensors", images)
    assert student.training
    assert (tmp_path / "eval.safetensors").read_bytes() == (tmp_path / "train.safetensors").read_bytes()


@pytest.mark.parametrize("classes", [10, 0])
def test_classes_that_nobody_names_have_their_number(make_model, tmp_path: Path, images: Tensor, classes: int) -> None:
    student = student_of(make_model(num_classes=classes, global_pool="avg"), images, QuantConfig())
    export(student, tmp_path / "m.safetensors", preprocessing=preprocessing())
    assert read_packed(tmp_path / "m.safetensors").classes == [f"LABEL_{number}" for number in range(classes)]


def test_header_says_what_was_given(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    student = student_of(vit, images, QuantConfig())
    model = packed(student, tmp_path / "m.safetensors", images, origin={"method": "q-vit", "metrics": {"top1": 80.5}})
    assert model.classes == CLASSES
    assert model.origin == {"method": "q-vit", "metrics": {"top1": 80.5}}
    assert model.preprocessing == preprocessing()
    assert model.program.name == VIT
    attentions = model.program.attentions()
    assert list(attentions) == ["blocks.0.attn", "blocks.1.attn"]
    for attention, x in attentions.values():
        assert attention.rectifier is None  # a rectifier of heads is folded into the layers
        assert (x.width, x.tokens, x.prefix, x.grid) == (24, 17, 1, (4, 4))


@pytest.mark.parametrize(("bits", "limit"), [(4, 12_100_000), (2, 6_800_000)])
def test_deit_small_is_as_small_as_promised(tmp_path: Path, bits: int, limit: int) -> None:
    # A real one of 22 million weights: the promise is about bytes on disk, class names included.
    names = ImageNetInfo().label_descriptions()
    teacher = timm.create_model("deit_small_patch16_224")
    student = quantize(teacher, QuantConfig(bits, bits))
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.set(torch.full_like(module.log_scale, 0.02))
    settings = timm.data.resolve_model_data_config(teacher)
    qvit.export(student, tmp_path / "s.safetensors", preprocessing=settings, classes=names)
    size = (tmp_path / "s.safetensors").stat().st_size
    assert 0.9 * limit < size <= limit


def refused(student: nn.Module, path: Path, error: type[Exception], match: str, **kwargs: Any) -> None:
    given = {"preprocessing": preprocessing(), "classes": CLASSES, **kwargs}
    with pytest.raises(error, match=match):
        qvit.export(student, path, **given)
    assert not path.exists()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"act_layer": "hard_swish"}, r"blocks\.0\.mlp\.act \(Hardswish\): a packed file knows the activations gelu,"),
        ({"mlp_layer": GatedMlp}, r"blocks\.0\.mlp \(GatedMlp\): a packed file knows Mlp, GluMlp, SwiGLU"),
        ({"global_pool": ""}, r"the model \(VisionTransformer\): it pools by ''"),
        ({"norm_layer": nn.Identity}, r"blocks\.0\.norm1? \(Identity\): a block needs its norms"),
        ({"norm_layer": partial(SimpleNorm, affine=False)}, r"blocks\.0\.norm1 \(SimpleNorm\): it is no LayerNorm"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(
    make_model, tmp_path: Path, images: Tensor, kwargs: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=match):  # by the gate, before anything is trained
        quantize(make_model(**kwargs))


def test_blocks_that_differ_are_what_they_are(make_model, tmp_path: Path, images: Tensor) -> None:
    model = make_model(depth=4)
    model.blocks[1].mlp.act = nn.ReLU()
    model.blocks[2].mlp = GluMlp(24, 20, act_layer=nn.SiLU)
    model.blocks[3] = make_model(block_fn=ResPostBlock, num_heads=3, depth=1, norm_layer=nn.RMSNorm).blocks[0]
    student = student_of(model, images, QuantConfig())
    file = packed(student, tmp_path / "m.safetensors", images)
    mlps = [op.branches[0] for op in file.program.operations if isinstance(op, Residual)][1::2]
    assert [(mlp.kind, mlp.activation) for mlp in mlps] == [
        ("plain", "gelu"),
        ("plain", "relu"),
        ("glu_gate_last", "silu"),
        ("plain", "gelu"),
    ]
    assert [attention.heads for attention, _ in file.program.attentions().values()] == [2, 2, 2, 3]
    check_same(student, file, images)


def test_norms_of_queries_and_keys_may_differ(make_model, tmp_path: Path, images: Tensor) -> None:
    model = make_model(qk_norm=True)
    model.blocks[0].attn.k_norm = nn.RMSNorm(12, eps=1e-3)
    model.blocks[1].attn.q_norm = nn.Identity()
    student = student_of(model, images, QuantConfig())
    file = packed(student, tmp_path / "m.safetensors", images)
    first, second = (attention for attention, _ in file.program.attentions().values())
    assert (first.query_norm.kind, first.key_norm.kind, first.key_norm.eps) == ("layer", "rms", 1e-3)
    assert second.query_norm is None
    assert second.key_norm.kind == "layer"
    check_same(student, file, images)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("rectifier", ["head", "token"])
def test_feature_extractor_gives_its_vectors(
    make_model, tmp_path: Path, images: Tensor, pool: str, rectifier: Any
) -> None:
    student = student_of(make_model(num_classes=0, global_pool=pool), images, QuantConfig(rectifier=rectifier))
    path = tmp_path / "m.safetensors"
    qvit.export(student, path, preprocessing=preprocessing(), classes=[])
    file = read_packed(path)
    assert not file.program.classifies
    assert file.program.output == 24
    assert file.classes == []
    check_same(student, file, images)
    match = "classes has 10 names, the model is a feature extractor and has none"
    refused(student, tmp_path / "classes.safetensors", ConfigError, match)


def test_another_class_with_its_own_forward_is_refused(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    class Other(type(vit)):  # type: ignore[misc]
        pass

    student = student_of(vit, images, QuantConfig())
    student.__class__ = Other
    refused(student, tmp_path / "m.safetensors", UnsupportedModelError, r"the model \(Other\)")


def test_float_model_is_refused(vit: nn.Module, tmp_path: Path) -> None:
    refused(vit, tmp_path / "m.safetensors", UnsupportedModelError, "pass what qvit.quantize returned")


def test_uncalibrated_model_is_refused(vit: nn.Module, tmp_path: Path) -> None:
    refused(quantize(vit), tmp_path / "m.safetensors", UncalibratedError, "patch_embed.proj.* has no scale")


def test_switched_off_quantizer_is_refused(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    student = student_of(vit, images, QuantConfig())
    student.blocks[1].mlp.fc1.input_quantizer.enabled = False
    refused(student, tmp_path / "m.safetensors", UnsupportedModelError, r"blocks\.1\.mlp\.fc1\.input_quantizer")


@pytest.mark.parametrize(("rectifier", "error"), [("head", UnsupportedModelError), ("token", PackedFileError)])
def test_rectifier_that_divides_by_zero_is_refused(
    vit: nn.Module, tmp_path: Path, images: Tensor, rectifier: Any, error: type[Exception]
) -> None:
    student = student_of(vit, images, QuantConfig(rectifier=rectifier))
    with torch.no_grad():
        student.blocks[0].attn.key_rectifier.gamma[1, 0, 2] = 0
    refused(student, tmp_path / "m.safetensors", error, r"blocks\.0\.attn\.key_rectifier.* holds a 0")


def test_weights_that_are_not_numbers_are_refused(vit: nn.Module, tmp_path: Path, images: Tensor) -> None:
    student = student_of(vit, images, QuantConfig())
    with torch.no_grad():
        student.blocks[0].norm2.bias[3] = torch.inf
    refused(student, tmp_path / "m.safetensors", PackedFileError, r"blocks\.0\.norm2\.bias holds a NaN or an infinity")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"classes": ["one"]}, "classes has 1 names, the model has 10 logits"),
        ({"classes": list(range(10))}, "classes must be a list of names"),
        ({"classes": set("abcdefghij")}, "classes must be a list of names in the order of the logits, not a set"),
        ({"classes": dict.fromkeys("abcdefghij")}, "in the order of the logits, not a dict"),
        ({"classes": "abcdefghij"}, "in the order of the logits, not a str"),
        ({"classes": iter("abc")}, "classes has 3 names"),
        ({"preprocessing": {}}, "input_size must be channels, height and width"),
        ({"preprocessing": {**preprocessing(), "mean": [0.5]}}, "preprocessing.mean must be 3 numbers"),
        ({"preprocessing": {**preprocessing(), "input_size": [3, 32, 32]}}, "not the model's image size"),
        ({"preprocessing": {**preprocessing(), "input_size": [1, 16, 16]}}, r"must be \[3, 16, 16\]"),
    ],
)
def test_wrong_description_is_refused(
    vit: nn.Module, tmp_path: Path, images: Tensor, change: dict[str, Any], match: str
) -> None:
    refused(student_of(vit, images, QuantConfig()), tmp_path / "m.safetensors", ConfigError, match, **change)


def test_image_size_that_cuts_a_patch_is_refused(make_model, tmp_path: Path, images: Tensor) -> None:
    student = student_of(make_model(dynamic_img_size=True), images, QuantConfig())
    settings = {"preprocessing": preprocessing((3, 18, 16))}
    refused(student, tmp_path / "m.safetensors", ConfigError, "whole patches", **settings)


def test_checkpoint_becomes_a_file_that_says_where_it_came_from(make_model, tmp_path: Path, images: Tensor) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    spec = describe(VIT, arguments, CLASSES, {})
    config = QuantConfig(3, 4)
    student = student_of(make_model(), images, config)
    quantized = dataclasses.replace(spec, quant_config=config.to_dict(), method="q-vit", metrics={"val_top1": 80.5})
    write_checkpoint(tmp_path / "q.pt", quantized, student)
    export_checkpoint(tmp_path / "q.pt", tmp_path / "m.safetensors")
    model = read_packed(tmp_path / "m.safetensors")
    assert model.classes == CLASSES
    assert model.preprocessing == spec.preprocessing
    assert model.origin["method"] == "q-vit"
    assert model.origin["metrics"] == {"val_top1": 80.5}
    assert model.origin["quantization"]["weight_bits"] == 3
    check_same(student, model, images)


def test_float_checkpoint_is_refused_with_the_way_out(make_model, tmp_path: Path) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    write_checkpoint(tmp_path / "f.pt", describe(VIT, arguments, CLASSES, {}), make_model())
    with pytest.raises(CheckpointError, match="holds a float model: quantize it first, qvit train"):
        export_checkpoint(tmp_path / "f.pt", tmp_path / "m.safetensors")


def test_command_exports_and_informs(make_model, tmp_path: Path, images: Tensor) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    spec = describe(VIT, arguments, CLASSES, {})
    student = student_of(make_model(), images, QuantConfig())
    write_checkpoint(tmp_path / "q.pt", dataclasses.replace(spec, quant_config=QuantConfig().to_dict()), student)
    done = run("export", tmp_path / "q.pt", tmp_path / "m.safetensors")
    assert done.status == 0, done.err
    assert "MB" in done.out
    done = run("info", tmp_path / "m.safetensors")
    assert done.status == 0, done.err
    assert VIT in done.out
    assert "class 0; class 1" in done.out
