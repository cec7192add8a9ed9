"""Reconstruction: it comes nearer to the float model, is the same again, keeps its budget, and restores what fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qvit.quantization.reconstruct as module
from members import family_member, student_of, vary
from qvit import QuantConfig, calibrate, quantize, reconstruct
from qvit.analysis.agreement import agreement
from qvit.errors import ConfigError, DataError, NonFiniteLossError, TeacherMismatchError, UncalibratedError
from qvit.models.families import family_of
from qvit.quantization.outputs import output_distance, views
from qvit.quantization.reconstruct import Progress, Reconstruction, Settings


@pytest.fixture
def student(vit: nn.Module, images: Tensor) -> Any:
    made = quantize(vit, QuantConfig(2, 2))
    calibrate(made, [images])
    return made


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def distance(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float(output_distance(student.eval()(images), teacher(images), classes=True))


def test_student_comes_nearer_to_the_teacher_on_images_that_it_has_not_seen(vit: nn.Module, student: Any) -> None:
    seen, unseen = torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(5)).split(64)
    before, teacher, calibrated = distance(student, vit, unseen), weights(vit), agreement(student, vit, [unseen])
    student.train()
    reconstruct(student, vit, [seen], steps=60, batch_size=32)
    assert student.training
    assert all(module.training for module in student.modules())
    assert distance(student, vit, unseen) < 0.6 * before
    assert agreement(student, vit, [unseen]).cosine > calibrated.cosine
    assert same(weights(vit), teacher)
    assert not vit.training


def test_same_seed_same_student(vit: nn.Module, student: Any, images: Tensor) -> None:
    other, third = copy.deepcopy(student), copy.deepcopy(student)
    for model, seed in ((student, 3), (other, 3), (third, 4)):
        reconstruct(model, vit, list(images.split(5)), steps=4, batch_size=8, seed=seed)
    assert same(weights(student), weights(other))
    assert not same(weights(student), weights(third))


def test_compiled_steps_follow_the_eager_ones(make_model: Any, images: Tensor) -> None:
    vit = make_model(depth=1)
    student = student_of(vit, images, QuantConfig(2, 2))
    other = copy.deepcopy(student)
    losses: list[list[float]] = [[], []]
    for model, compiled, seen in ((student, False, losses[0]), (other, True, losses[1])):
        reconstruct(
            model,
            vit,
            [images],
            steps=3,
            batch_size=8,
            compile=compiled,
            report=lambda p, seen=seen: seen.append(p.loss),
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert vit._compiled_call_impl is None
    assert other._compiled_call_impl is None


def test_images_may_come_with_labels_and_in_batches_of_any_size(vit: nn.Module, student: Any, images: Tensor) -> None:
    other = copy.deepcopy(student)
    reconstruct(student, vit, [images], steps=2, batch_size=8)
    reconstruct(other, vit, [(images[:3], torch.zeros(3)), [images[3:], None]], steps=2, batch_size=8)
    assert same(weights(student), weights(other))


def test_a_reconstruction_that_was_saved_goes_on_as_if_nothing_had_been(
    vit: nn.Module, student: Any, images: Tensor
) -> None:
    whole = copy.deepcopy(student)
    reconstruct(whole, vit, [images], steps=6, batch_size=8)
    saved: dict[str, Any] = {}

    class Cut(Exception):  # noqa: N818
        pass

    first = Reconstruction(student, vit, [images], Settings(steps=6, batch_size=8))

    def cut(progress: Progress) -> None:
        if progress.step == 3:
            saved.update(weights=weights(student), state=copy.deepcopy(first.state_dict()))
            raise Cut

    with pytest.raises(Cut):
        first.go_on(cut)
    again = quantize(vit, QuantConfig(2, 2))
    again.load_state_dict(saved["weights"])  # before it begins, and its rates are not those of the weights of now
    second = Reconstruction(again, vit, [images], Settings(steps=6, batch_size=8))
    second.load_state_dict(saved["state"])
    assert second.go_on(lambda progress: None).step == 6
    assert same(weights(again), weights(whole))


def timed(run: Reconstruction, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> list[float]:
    """Give a reconstruction a clock that its steps move, and return where their highest rates will be."""
    now, rates, step = [0.0], list[float](), run._make_step

    def make_step(learned: Any) -> float:
        now[0] += seconds(len(rates))
        rates.append(max(group["lr"] for group in run.optimizer.param_groups))
        return step(learned)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "_make_step", make_step)
    return rates


def test_budget_of_time_becomes_steps_that_make_the_same_student_again(
    vit: nn.Module, student: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, before = copy.deepcopy(student), weights(student)
    run = Reconstruction(student, vit, [images], Settings(minutes=10, batch_size=4))
    rates = timed(run, monkeypatch, lambda step: 60 if step == 0 else 20)  # the first one compiles
    progresses: list[Progress] = []
    reached = run.go_on(progresses.append)
    assert rates[:4] == [0, 0, 0, 0]
    assert reached.steps == reached.step == 22  # 95 % of the 480 seconds that are left, 20 each
    assert {progress.steps for progress in progresses} == {22}
    assert reached.seconds == 560
    assert reached.on_time
    assert not same(weights(student), before)
    monkeypatch.undo()
    reconstruct(other, vit, [images], steps=22, batch_size=4)
    assert same(weights(student), weights(other))


def test_budget_of_time_is_kept_where_steps_become_slower(
    vit: nn.Module, student: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Reconstruction(student, vit, [images], Settings(minutes=10, batch_size=4))
    rates = timed(run, monkeypatch, lambda step: 20 if step < 12 else 40)
    reached = run.go_on(lambda progress: None)
    assert reached.steps == 24
    assert reached.step == 8 + 9  # 80 seconds to plan, 160 of 20 each, and 360 of 40
    assert reached.seconds == 600
    assert reached.fraction == 1
    assert not reached.on_time
    assert max(rates) > 0.9 * max(run.peaks.values())
    assert rates[-1] < 0.05 * max(rates)  # where time ends, the learning rate has come down


def test_a_step_longer_than_the_budget_ends_it(vit: nn.Module, student: Any, images: Tensor) -> None:
    assert reconstruct(student, vit, [images], minutes=1e-9, batch_size=2).step == 1


def test_if_it_fails_the_student_is_what_it_was(
    vit: nn.Module, student: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = weights(student), iter(range(100))

    def distance_with_a_nan(*args: Any, **kwargs: Any) -> Tensor:
        return output_distance(*args, **kwargs) * (math.nan if next(calls) == 2 else 1)

    monkeypatch.setattr(module, "output_distance", distance_with_a_nan)
    with pytest.raises(NonFiniteLossError, match="in step 3"):
        reconstruct(student, vit, [images], steps=5)
    assert same(weights(student), before)


def test_ctrl_c_keeps_the_steps_that_were_made(vit: nn.Module, student: Any, images: Tensor) -> None:
    before = weights(student)

    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(student, vit, [images], steps=5, report=interrupt)
    assert not same(weights(student), before)
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize(
    ("member", "learning_rate"),
    [
        *((name, 1e-3) for name in ("swin", "swinv2", "swinv2_cr_stage_norms", "beit", "eva02", "siglip")),
        *((name, 1e-4) for name in ("relpos_mlp", "dinov3")),  # whose blocks do little, so that little is lost
    ],
)
def test_every_family_is_reconstructed(member: str, learning_rate: float) -> None:
    teacher, images = family_member(member)
    student = quantize(teacher, QuantConfig(2, 2, rectifier=None))
    calibrate(student, [images])
    before = agreement(student, teacher, [images])
    reconstruct(student, teacher, [images], steps=12, batch_size=8, learning_rate=learning_rate)
    after = agreement(student, teacher, [images])
    assert after.cosine > before.cosine
    assert list(after.blocks) == list(before.blocks)
    assert len(after.blocks) == len(family_of(teacher).blocks(teacher))


def test_feature_extractors_are_compared_by_their_vectors(make_model: Any, images: Tensor) -> None:
    teacher = make_model(num_classes=0)
    student = quantize(teacher, QuantConfig(2, 2))
    calibrate(student, [images])
    before = agreement(student, teacher, [images])
    reconstruct(student, teacher, [images], steps=20, batch_size=16)
    after = agreement(student, teacher, [images])
    assert (before.same_class, after.same_class) == (None, None)
    assert after.cosine > before.cosine


def test_agreement_of_a_model_with_itself_is_whole(vit: nn.Module, images: Tensor) -> None:
    found = agreement(vit, vit, images.split(6))
    assert found.images == 16
    assert found.same_class == 100
    assert found.cosine == pytest.approx(1)
    assert set(found.blocks.values()) == {0.0}


def test_agreement_does_not_depend_on_the_batches(vit: nn.Module, student: Any, images: Tensor) -> None:
    whole, parts = agreement(student, vit, [images]), agreement(student, vit, images.split(5))
    assert whole.same_class == parts.same_class
    assert whole.cosine == pytest.approx(parts.cosine)
    assert list(whole.blocks.values()) == pytest.approx(list(parts.blocks.values()), rel=1e-5)


def test_agreement_counts_what_it_says(vit: nn.Module, student: Any, images: Tensor) -> None:
    vit.requires_grad_(False)
    student.eval().requires_grad_(False)
    wanted, got = vit(images), student(images)
    found = agreement(student, vit, [images])
    assert found.same_class == 100 * float((wanted.argmax(1) == got.argmax(1)).float().mean())
    float_output, output = (model.blocks[0](model._pos_embed(model.patch_embed(images))) for model in (vit, student))
    spread = (float_output - float_output.mean(dim=(0, 1))).square().sum()
    assert found.blocks["blocks.0"] == pytest.approx(float((output - float_output).square().sum() / spread), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_views_are_pictures_of_the_same_size_and_range(count: int, height: int, width: int, seed: int) -> None:
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    made = views(images, torch.Generator().manual_seed(seed))
    assert made.shape == images.shape
    assert made.min() >= images.min()
    assert made.max() <= images.max()
    assert torch.equal(made, views(images, torch.Generator().manual_seed(seed)))


def test_output_distance_is_the_divergence_of_the_probabilities() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = teacher.softmax(1), student.softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(output_distance(student, teacher, classes=True), expected)
    assert float(output_distance(teacher, teacher, classes=True)) == pytest.approx(0, abs=1e-6)
    assert float(output_distance(teacher, teacher, classes=False)) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give either steps or minutes"),
        ({"steps": 1, "minutes": 1}, "give either steps or minutes"),
        ({"steps": 0}, "steps must be a whole number from 1 up, not 0"),
        ({"steps": True}, "steps must be"),
        ({"minutes": 0}, "minutes must be a number above 0, not 0"),
        ({"minutes": math.nan}, "minutes must be"),
        ({"steps": 1, "batch_size": 0.5}, "batch_size must be"),
        ({"steps": 1, "learning_rate": -1}, "learning_rate must be"),
        ({"steps": 1, "precision": "fp16"}, "precision must be no or bf16, not 'fp16'"),
    ],
)
def test_what_cannot_be_meant_is_named(
    vit: nn.Module, student: Any, images: Tensor, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        reconstruct(student, vit, [images], **arguments)


def test_models_that_do_not_fit_are_refused(vit: nn.Module, student: Any, images: Tensor, make_model: Any) -> None:
    with pytest.raises(ConfigError, match="no quantizers"):
        reconstruct(vit, vit, [images], steps=1)
    with pytest.raises(UncalibratedError, match=r"patch_embed\.proj\.input_quantizer has no scale yet"):
        reconstruct(quantize(vit), vit, [images], steps=1)
    with pytest.raises(TeacherMismatchError, match=r"The student gives \(32, 10\), the teacher \(32, 7\)"):
        reconstruct(student, make_model(num_classes=7), [images], steps=1)
    with pytest.raises(DataError, match="at least one image"):
        reconstruct(student, vit, [], steps=1)


def test_frozen_parameters_stay(vit: nn.Module, student: Any, images: Tensor) -> None:
    student.patch_embed.requires_grad_(False)
    before = weights(student)
    reconstruct(student, vit, [images], steps=2)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not any(name.startswith("patch_embed.") for name in moved)


def test_zero_parameters_learn_and_scales_move_as_they_are(vit: nn.Module, images: Tensor) -> None:
    teacher = vary(vit)
    with torch.no_grad():
        teacher.head.bias.zero_()  # type: ignore[union-attr, operator]
    student = quantize(teacher, QuantConfig(2, 2))
    calibrate(student, [images])
    run = Reconstruction(student, teacher, [images], Settings(steps=3))
    assert all(0 < peak <= 0.1 for peak in run.peaks.values())
    assert {peak for name, peak in run.peaks.items() if name.endswith("log_scale")} == {module.LEARNING_RATE}
    before = weights(student)
    run.go_on(lambda progress: None)
    assert not torch.equal(student.head.bias, before["head.bias"])


def test_batches_that_are_no_images_of_one_size_are_refused(vit: nn.Module, student: Any, images: Tensor) -> None:
    for batches, said in (
        (images, r"one is torch.float32 \(3, 16, 16\)"),
        ([images.byte()], r"one is torch.uint8"),
        (["x"], "one is str"),
        ([images, images[..., :8]], r"of one size, not \(3, 16, 16\) and \(3, 16, 8\)"),
    ):
        with pytest.raises(DataError, match=said):
            reconstruct(student, vit, batches, steps=1)


def test_a_student_that_cannot_learn_and_weights_without_end_are_refused(
    vit: nn.Module, student: Any, images: Tensor
) -> None:
    with pytest.raises(ConfigError, match="No parameter of this model learns"):
        reconstruct(copy.deepcopy(student).requires_grad_(False), vit, [images], steps=1)
    with torch.no_grad():
        student.head.weight.fill_(math.inf)
    with pytest.raises(NonFiniteLossError, match="The weights of head.weight hold a NaN or an infinity"):
        reconstruct(student, vit, [images], steps=1)


def test_one_class_is_compared_as_a_vector(make_model: Any, images: Tensor) -> None:
    teacher = make_model(num_classes=1)
    student = quantize(teacher, QuantConfig(2, 2))
    calibrate(student, [images])
    before = weights(student)
    assert reconstruct(student, teacher, [images], steps=2).loss > 0
    assert not same(weights(student), before)
    assert agreement(student, teacher, [images]).same_class is None


def test_agreement_refuses_outputs_without_end_by_the_name_of_the_block(
    vit: nn.Module, student: Any, images: Tensor
) -> None:
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias.fill_(math.inf)  # type: ignore[index, union-attr, operator]
    with pytest.raises(DataError, match=r"The output of blocks\.1 holds a NaN or an infinity"):
        agreement(student, vit, [images])
