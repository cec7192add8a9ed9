"""What a student is beside its layers: its mode, its state dict, its weight decay, its copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import qvit
from conftest import make_vit
from members import preprocessing
from qvit import DistillationLoss, QuantConfig, calibrate, export, quantize, save_checkpoint
from qvit.errors import ConfigError, DataError, ModeError, TeacherMismatchError, UnsupportedModelError
from qvit.nn.quantizer import BITS, Float32Module, Quantizer
from qvit.nn.rectifier import HeadRectifier
from qvit.quantization.convert import layers_with_bits

DISTILLED = "deit_tiny_distilled_patch16_224"
VIT = "vit_tiny_patch16_224"


def student_of(teacher: nn.Module, images: Tensor, *args: Any, **kwargs: Any) -> Any:
    student = quantize(teacher, QuantConfig(*args, **kwargs))
    calibrate(student, [images])
    return student


def own_parameters(student: nn.Module) -> set[str]:
    names = {f"{path}.{name}" for path, module in student.named_modules() if isinstance(module, Float32Module)
             for name, _ in module.named_parameters(recurse=False)}  # fmt: skip
    assert {name.rpartition(".")[2] for name in names} >= {"log_scale", "offset"}
    return names


# --- mode -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_student_is_in_training_mode_whatever_the_teacher_is(vit: nn.Module, training: bool) -> None:
    student = quantize(vit.train(training))
    assert all(module.training for module in student.modules())
    assert all(module.training is training for module in vit.modules())


def test_the_readmes_way_moves_the_rectifiers_statistics(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    student = student_of(vit, images)
    rectifiers = [module for module in student.modules() if isinstance(module, HeadRectifier)]
    before = [rectifier.running_var.clone() for rectifier in rectifiers]
    DistillationLoss(vit)(student, images + 1, labels).backward()
    assert len(rectifiers) == 4
    assert not any(torch.equal(r.running_var, was) for r, was in zip(rectifiers, before, strict=True))


@pytest.mark.parametrize("wrap", [lambda student: student, nn.Sequential])
@pytest.mark.parametrize("guided", [True, False])
def test_student_in_evaluation_mode_is_not_trained(vit: nn.Module, images, labels, guided: bool, wrap) -> None:
    student = student_of(vit, images).eval()
    loss_fn = DistillationLoss(vit, guided=guided)
    with pytest.raises(ModeError, match=r"student\.train\(\)"):
        loss_fn(wrap(student), images, labels)
    with torch.no_grad():
        assert torch.isfinite(loss_fn(wrap(student), images, labels))
    student.train().blocks[0].eval()  # a part may be kept as it is
    assert torch.isfinite(loss_fn(wrap(student), images, labels))


def test_teacher_in_training_mode_is_refused(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    student = student_of(vit, images)
    loss_fn = DistillationLoss(vit)
    vit.train()
    with pytest.raises(ModeError, match=r"teacher\.eval\(\)"):
        loss_fn(student, images, labels)


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, DISTILLED])
@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_no_weight_decay_names_the_parameters_of_quantizers_and_rectifiers(make_model, name: str, rectifier) -> None:
    teacher = make_model(name)
    student = quantize(teacher, QuantConfig(rectifier=rectifier))
    kept = student.no_weight_decay()
    expected = set(teacher.no_weight_decay()) | own_parameters(student)
    assert kept == expected | {f"_orig_mod.{name}" for name in expected}  # as torch.compile's wrapper calls them
    kept.clear()  # a set of the caller's own
    assert student.no_weight_decay()


@pytest.mark.parametrize("arguments", [{}, {"layer_decay": 0.75}])
def test_timms_optimizer_decays_the_floats_matrices_alone(vit: nn.Module, images: Tensor, arguments) -> None:
    student = student_of(vit, images)
    optimizer = create_optimizer_v2(student, opt="sgd", lr=0.1, weight_decay=0.05, **arguments)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    matrices = {id(p) for name, p in student.named_parameters() if name.endswith(".weight") and p.ndim > 1}
    assert decayed == matrices
    before = {name: value.clone() for name, value in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameters = own_parameters(student)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters() if name in parameters)
    assert not torch.equal(student.head.weight, before["head.weight"])


# --- copies -----------------------------------------------------------------------------------------------------------


def _deepcopied(student: nn.Module) -> nn.Module:
    return copy.deepcopy(student)


def _pickled(student: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(student))


@pytest.mark.parametrize("again", [_deepcopied, _pickled])
def test_copy_of_a_student_is_a_student(vit: nn.Module, images: Tensor, again: Callable[[Any], Any]) -> None:
    student = student_of(vit, images).eval()
    other = again(student)
    assert torch.equal(other(images), student(images))
    assert other.no_weight_decay() == student.no_weight_decay()
    with torch.no_grad():
        student.head.weight.zero_()
    other.load_state_dict(vit.state_dict())  # of a float model: its own scales go, and not the first student's
    assert torch.equal(other.head.weight, vit.head.weight)
    assert not other.blocks[0].attn.query_quantizer.calibrated
    assert student.blocks[0].attn.query_quantizer.calibrated
    with pytest.raises(ConfigError, match="2 bits at"):
        other.load_state_dict(quantize(vit, QuantConfig(2, 2)).state_dict())


def test_compiled_student_has_all_of_it(vit: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(student_of(vit, images), backend="eager")
    optimizer = create_optimizer_v2(compiled, opt="sgd", lr=0.1, weight_decay=0.05)
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert len(decayed) == 1 + 2 * 4 + 1  # patch embedding, four a block, head
    with pytest.raises(ConfigError, match="2 bits at"):
        compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in quantize(vit, QuantConfig(2)).state_dict().items()})


# --- state dict -------------------------------------------------------------------------------------------------------

BITWIDTHS = st.tuples(st.integers(2, 8), st.integers(2, 8))


@settings(max_examples=25, deadline=None)
@given(bits=BITWIDTHS, other_bits=BITWIDTHS, strict=st.booleans(), whole=st.booleans())
def test_state_dict_of_other_bits_is_refused(bits, other_bits, strict: bool, whole: bool) -> None:
    from conftest import make_vit

    vit = make_vit(depth=1, embed_dim=8)
    model: nn.Module = quantize(vit, QuantConfig(*bits))
    state = quantize(vit, QuantConfig(*other_bits)).state_dict()
    if not whole:  # a part of it, by itself
        model, state = model.blocks[0], {  # type: ignore[index, union-attr]
            name.removeprefix("blocks.0."): value for name, value in state.items() if name.startswith("blocks.0.")
        }  # fmt: skip
    if bits == other_bits:
        model.load_state_dict(state, strict=strict)
        return
    with pytest.raises(ConfigError, match=r"has \d bits at (blocks\.0\.)?\S+_quantizer, the model \d: quantize"):
        model.load_state_dict(state, strict=strict)


def test_state_dict_of_before_the_bits_were_recorded_loads(vit: nn.Module, images: Tensor) -> None:
    student = student_of(vit, images).eval()
    older = {name: value for name, value in student.state_dict().items() if not name.endswith(BITS)}
    other = quantize(vit).eval()
    other.load_state_dict(older)
    assert torch.equal(other(images), student(images))
    assert all(module.code_bits == module.bits for module in other.modules() if isinstance(module, Quantizer))


@pytest.mark.parametrize(
    ("part", "named"),
    [("query_rectifier", "rectifier.gamma"), ("fc1.input_quantizer", "fc1.input_quantizer.log_scale")],
)
def test_student_whose_state_dict_lacks_a_part_does_not_load(vit, images: Tensor, part: str, named: str) -> None:
    """Only a float model's state dict, which has none of them at all, may leave scales and rectifiers as they are."""
    state = student_of(vit, images).state_dict()
    partial = {name: value for name, value in state.items() if f".{part}." not in name}
    with pytest.raises(RuntimeError, match=named):
        quantize(vit).load_state_dict(partial)


def test_state_dict_without_rectifiers_does_not_load_into_a_student_with_them(vit, images: Tensor) -> None:
    baseline = student_of(vit, images, rectifier=None)
    with pytest.raises(RuntimeError, match=r"rectifier\.gamma"):
        quantize(vit, QuantConfig(rectifier="head")).load_state_dict(baseline.state_dict())


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("blokcs.*", r"did you mean 'blocks\.\*'"),
        ("blocks.0.mpl.fc1", r"'blocks\.0\.mlp\.fc1'"),
        ("block.1.*", r"'blocks\.1\.\*'"),
        ("*.query", "layers are called like 'patch_embed.proj'"),
        ("blocks.2.*", r"'blocks\.[01]\.\*'"),
        ("blocks", "blocks|patch"),
    ],
)
def test_override_that_matches_no_layer_is_refused(vit: nn.Module, pattern: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"override '.*' matches no layer of the model: .*{hint}") as caught:
        quantize(vit, QuantConfig(overrides={"blocks.0.*": 8, pattern: 8}))
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_every_layer_can_be_overridden_by_its_name(make_model, name: str) -> None:
    teacher = make_model(name)
    names = layers_with_bits(teacher)
    student = quantize(teacher, QuantConfig(overrides=dict.fromkeys(names, (3, 5))))
    activations = {m.bits for m in student.modules() if isinstance(m, Quantizer) and m.batched}
    weights = {m.bits for m in student.modules() if isinstance(m, Quantizer) and not m.batched}
    assert (activations, weights) == ({5}, {3})
    assert len(names) == sum(isinstance(m, Quantizer) and m.batched for m in student.modules())


# --- what cannot be run -----------------------------------------------------------------------------------------------


def runs(student: nn.Module, teacher: nn.Module, batches: Any) -> list[Callable[[], object]]:
    """Return what runs one of two models, or both, on batches."""
    return [
        lambda: calibrate(student, batches),
        lambda: qvit.reconstruct(student, teacher, batches, steps=1),
        lambda: qvit.agreement(student, teacher, batches),
        lambda: qvit.search_bits(teacher, batches, {"mb": 1}),
    ]


def test_model_on_the_meta_device_is_refused_by_all_that_take_its_values(vit, images: Tensor, tmp_path: Path) -> None:
    student = student_of(vit, images)
    empty, no_teacher = (copy.deepcopy(model).to("meta") for model in (student, vit))
    writers = [
        partial(write, empty, tmp_path / "m", preprocessing=preprocessing()) for write in (export, save_checkpoint)
    ]
    functions = runs(empty, vit, [images])[:3] + runs(student, no_teacher, [images])[1:]
    for function in [*functions, *writers, lambda: DistillationLoss(no_teacher)]:
        with pytest.raises(UnsupportedModelError, match=r"cls_token has no values, .* give it memory by to_empty"):
            function()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x, r"torch.float32 \(3, 16, 16\)"),
        (lambda x: [x.byte()], r"torch.uint8 \(16, 3, 16, 16\)"),
        (lambda x: [x.numpy()], "ndarray"),
        (lambda x: [{"images": x}], "dict"),
        (lambda x: [()], "tuple"),
    ],
)
def test_batches_that_are_no_images_are_refused(vit, images: Tensor, change, kind: str) -> None:
    for function in runs(student_of(vit, images), vit, change(images)):
        with pytest.raises(DataError, match=rf"Batches must be tensors of images .* and one is {kind}: give a list"):
            function()


def test_images_of_another_type_are_made_the_models(vit: nn.Module, images: Tensor) -> None:
    student = student_of(vit, images)
    expected = copy.deepcopy(student.state_dict())
    calibrate(student, [images.double()])
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
    assert qvit.agreement(student, vit, [images.double()]) == qvit.agreement(student, vit, [images])
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1 channels"):
        student(images[:, :1])
    with pytest.raises(DataError, match="at least one image"):
        qvit.agreement(student, vit, [])
    for other in ({"depth": 1}, {"num_classes": 3}):
        with pytest.raises(TeacherMismatchError, match="not made of (this float model|it)"):
            qvit.agreement(student, make_vit(**other), [images])
    with pytest.raises(ConfigError, match="guided_layers names no layer"):
        DistillationLoss(vit, guided_layers=[])
