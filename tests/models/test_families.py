from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import Dropout, Identity

from members import (
    CLASSES,
    DISTILLED,
    FAMILIES,
    FAMILY_MEMBERS,
    SMALL,
    SMALL_SWIN,
    SWIN,
    VIT,
    check_same,
    family_member,
    packed,
    student_of,
)
from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.analysis.gradients import loss_gradients
from qvit.analysis.statistics import attention_distance, query_key_statistics
from qvit.errors import UnsupportedModelError
from qvit.models.families import family_of, image_size_of, lower
from qvit.models.from_program import float_model
from qvit.models.queries import attention_layers, run_with_maps, run_with_queries
from qvit.nn.attention import QuantAttention
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectifier import Rectifier

FIRST = [next(iter(members)) for members in FAMILIES.values()]


def classes_of(model: nn.Module) -> list[str]:
    return CLASSES[: model.num_classes]  # type: ignore[misc]


@pytest.mark.parametrize("member", FAMILY_MEMBERS)
def test_member_without_quantizers_computes_what_the_float_model_does(member: str) -> None:
    model, images = family_member(member)
    student = quantize(model, QuantConfig(rectifier="token")).eval()
    for module in student.modules():
        if isinstance(module, (Quantizer, Rectifier)):
            module.enabled = False
    with torch.no_grad():
        torch.testing.assert_close(student(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", FAMILY_MEMBERS)
def test_member_keeps_timms_names_and_loads_its_state_dict(member: str) -> None:
    model, _ = family_member(member)
    student = quantize(model)
    assert {name for name, _ in model.named_modules()} <= {name for name, _ in student.named_modules()}
    other = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    student.load_state_dict(other, strict=True)
    assert all(torch.equal(student.state_dict()[key], value) for key, value in other.items())


@pytest.mark.parametrize(("bits", "rectifier"), [(8, "token"), (4, "head"), (3, None)])
@pytest.mark.parametrize("member", FAMILY_MEMBERS)
def test_exported_member_computes_what_the_fake_quantized_model_does(
    tmp_path: Path, member: str, bits: int, rectifier: Any
) -> None:
    model, images = family_member(member)
    student = student_of(model, images, QuantConfig(bits, bits, rectifier))
    file = packed(student, tmp_path / "m.safetensors", images, classes=classes_of(model))
    check_same(student, file, images)


@pytest.mark.parametrize("member", FIRST)
def test_print_tells_the_bits_and_the_ends_keep_eight(member: str) -> None:
    model, _ = family_member(member)
    student = quantize(model, QuantConfig(3, 5))
    ends = [student.get_submodule("patch_embed.proj"), student.get_classifier()]
    assert all((end.weight_quantizer.bits, end.input_quantizer.bits) == (8, 8) for end in ends)
    for name, module in student.named_modules():
        if isinstance(module, Quantizer) and not name.startswith(("patch_embed", "head")):
            assert module.bits == (3 if name.endswith("weight_quantizer") else 5), name
    assert f"{type(attention_layers(student)[0]).__name__}(" in repr(student)
    assert "weight_bits=3, activation_bits=5" in repr(student)


@pytest.mark.parametrize("member", FIRST)
def test_blocks_hold_every_attention_of_the_family(member: str) -> None:
    model, _ = family_member(member)
    blocks = family_of(model).blocks(model)
    assert [attention_layers(block)[0] for block in blocks] == attention_layers(model)


@pytest.mark.parametrize("member", FIRST)
def test_queries_keys_and_maps_of_teacher_and_student_are_paired(member: str) -> None:
    model, images = family_member(member)
    student = quantize(model, QuantConfig(rectifier=None)).eval()
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.enabled = False
    modules = list(model.modules())
    with torch.no_grad():
        (_, queries, keys), (_, their_queries, their_keys) = (run_with_queries(m, images) for m in (student, model))
        maps, their_maps = (run_with_maps(m, images)[1] for m in (student, model))
    assert len(queries) == len(attention_layers(model)) == len(maps)
    pairs = zip([*queries, *keys, *maps], [*their_queries, *their_keys, *their_maps], strict=True)
    for student_logits, teacher_logits in pairs:
        torch.testing.assert_close(student_logits, teacher_logits, rtol=1e-4, atol=1e-4)
    for per_head in maps:
        torch.testing.assert_close(per_head.sum(dim=-1), torch.ones(per_head.shape[:-1]))
    assert list(model.modules()) == modules  # nothing is left in the teacher


@pytest.mark.parametrize("member", [*FIRST, "eva02_inner_norms", "mixed_rotary"])
def test_guided_distillation_trains_every_parameter(member: str) -> None:
    model, images = family_member(member)
    student = student_of(model, images, QuantConfig(4, 4)).train()
    loss = DistillationLoss(model)(student, images, torch.arange(len(images)))
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("member", ["swin", "eva02_inner_norms"])
def test_gradients_of_both_terms_are_told_apart(member: str) -> None:
    model, images = family_member(member)
    student = student_of(model, images, QuantConfig(4, 4))
    found = loss_gradients(student, DistillationLoss(model), [(images, torch.arange(len(images)))])
    assert len(found) == len(attention_layers(model))
    assert all(layer.labels > 0 and layer.guided > 0 for layer in found)


@pytest.mark.parametrize("member", FIRST)
def test_gradient_checkpointing_changes_no_gradient(member: str) -> None:
    model, images = family_member(member)
    gradients = []
    for enable in (False, True):
        student = student_of(model, images, QuantConfig(4, 4)).train()
        student.set_grad_checkpointing(enable)
        DistillationLoss(model)(student, images, torch.arange(len(images))).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("member", ["swin", "swinv2", "eva02"])
def test_training_step_with_a_compiled_block_equals_eager(member: str) -> None:
    model, images = family_member(member)
    student = student_of(model, images, QuantConfig(8, 8)).train()
    loss_fn = DistillationLoss(model)
    labels = torch.arange(len(images))
    loss_fn(student, images, labels).backward()
    expected = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    torch._dynamo.reset()
    family_of(student).blocks(student)[-1].compile(fullgraph=True, backend="aot_eager")
    loss_fn(student, images, labels).backward()
    for (name, parameter), gradient in zip(student.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("member", FIRST)
def test_calibrated_student_is_near_its_teacher_and_is_described(member: str) -> None:
    model, images = family_member(member)
    student = quantize(model, QuantConfig(8, 8))
    calibrate(student, [images])
    student.eval()
    with torch.no_grad():
        error = (student(images) - model(images)).norm() / model(images).norm()
    assert error < 0.2
    layers = query_key_statistics(student, [images])
    assert len(layers) == len(attention_layers(model))
    assert all(0 < layer.query_entropy <= 8 for layer in layers)  # type: ignore[operator]
    distance = attention_distance(model, student, [images])
    for row, layer in zip(distance, attention_layers(model), strict=True):
        assert int((~row.isnan()).sum()) == layer.num_heads
        assert 0 < float(row.nanmean()) < 0.1
    assert float(attention_distance(model, model, [images]).nansum()) == 0


@pytest.mark.parametrize("member", FIRST)
def test_no_fused_attention_runs_in_a_student(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = family_member(member)
    student = student_of(model, images, QuantConfig())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("scaled_dot_product_attention was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    assert any(isinstance(module, QuantAttention) for module in student.modules())
    assert bool(torch.isfinite(student(images)).all())


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        (
            SWIN,
            {**SMALL_SWIN, "img_size": 40},
            r"layers\.0\.blocks\.0\.attn .*\(4, 4\) patches do not divide .*\(10, 10\)",
        ),
        (
            SWIN,
            {**SMALL_SWIN, "img_size": 36, "window_size": 9},
            r"layers\.1\.downsample \(PatchMerging\): a grid of \(9, 9\)",
        ),
        (SWIN, {**SMALL_SWIN, "global_pool": ""}, r"head \(ClassifierHead\): it pools by ''"),
        (
            VIT,
            {**SMALL, "img_size": (18, 16), "pos_embed": "none", "dynamic_img_pad": True},
            r"patch_embed \(PatchEmbed\): it pads images of \(18, 16\) pixels",
        ),
        (DISTILLED, {**SMALL, "num_classes": 0}, r"head \(Identity\): without classifiers timm gives the mean"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(name: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        quantize(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    ("member", "path", "value", "match"),
    [
        ("swin", "layers.0.blocks.1.shift_size", (0, 0), r"layers\.0\.blocks\.1 .*not that of its shift_size \(0, 0\)"),
        ("swinv2", "layers.0.blocks.1.attn_mask", None, r"layers\.0\.blocks\.1 .*not that of its shift_size \(2, 2\)"),
        ("swinv2_cr", "stages.0.blocks.1.attn_mask", None, r"stages\.0\.blocks\.1 .*not that of its shift_size"),
        ("beit", "blocks.1.gamma_1", None, r"blocks\.1 \(Block\): it has one of gamma_1 and gamma_2"),
        ("eva02", "blocks.1.attn.rotate_half", True, r"blocks\.1\.attn .*rotates other channels together"),
        ("relpos_class_token", "num_prefix_tokens", 0, "its num_prefix_tokens is 0, and it has 1 of them"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(member: str, path: str, value: Any, match: str) -> None:
    model, _ = family_member(member)
    student = quantize(model)
    for changed in (model, student):
        owner, _, name = path.rpartition(".")
        setattr(changed.get_submodule(owner), name, value)
    for refused in (lambda: quantize(model), lambda: lower(student, image_size_of(student))):
        with pytest.raises(UnsupportedModelError, match=match):
            refused()


class Opposite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


@pytest.mark.parametrize("member", FIRST)
def test_module_where_timm_computes_nothing_is_refused_by_name(member: str) -> None:
    """In every place of a dropout or an identity; those that make a constant of the file are called, whatever it is."""
    model, _ = family_member(member)
    places = {re.sub(r"\d+", "0", name): name for name, m in model.named_modules() if type(m) in (Dropout, Identity)}
    for name in [name for name in places.values() if not re.search(r"rel_pos|meta_mlp|pool\.q_norm", name)]:
        found = model.get_submodule(name)
        model.set_submodule(name, Opposite())
        with pytest.raises(UnsupportedModelError, match=rf"^Cannot quantize {re.escape(name)} \(Opposite\): "):
            quantize(model)
        model.set_submodule(name, found)
    assert len(places) > 8


BUILT = [*FAMILIES["swin"], *FAMILIES["swinv2"], "eva", "eva_post_norm"]
"""Members whose float model is built by their operations; the two of EVA are plain vision transformers."""


@pytest.mark.parametrize("member", BUILT)
def test_float_model_of_a_program_computes_it(member: str) -> None:
    model, images = family_member(member)
    program, _ = lower(quantize(model, QuantConfig(2, 2, "token")), image_size_of(model))
    built = float_model(program)
    again, _ = lower(quantize(built), image_size_of(built))
    assert again.computation() == program.computation()
    assert again.operations != program.operations
    with torch.no_grad():
        assert built(images).shape == model(images).shape


CALLED = (
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "swinv2_cr_tiny_224",
    "vit_base_patch16_siglip_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_dinov3",
)


@pytest.mark.parametrize("name", CALLED)
def test_float_model_of_another_family_is_the_one_called_so(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        program, _ = lower(quantize(model), image_size_of(model))
        built = float_model(program)
        again, _ = lower(quantize(built), image_size_of(built))
    assert again == program


@pytest.mark.parametrize("member", [member for member in FAMILY_MEMBERS if member not in BUILT])
def test_float_model_that_timm_builds_otherwise_is_refused(member: str) -> None:
    """Models of other sizes than those that timm knows by their name."""
    model, _ = family_member(member)
    program, _ = lower(quantize(model), image_size_of(model))
    reason = f"timm has no float model for this {program.name}: timm's|timm cannot build {program.name}: "
    with pytest.raises(UnsupportedModelError, match=reason):
        float_model(program)


def test_float_model_that_timm_does_not_have_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("eva02_tiny_patch14_224")
        program, _ = lower(quantize(model), image_size_of(model))
    with pytest.raises(UnsupportedModelError, match="timm cannot build nothing"):
        float_model(dataclasses.replace(program, name="nothing"))
    with pytest.raises(UnsupportedModelError, match="timm's differs from operation 1 on, 'embed'"):
        float_model(dataclasses.replace(program, name="eva02_small_patch14_224"))
