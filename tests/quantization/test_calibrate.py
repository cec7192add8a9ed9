from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvit import QuantConfig, calibrate, quantize
from qvit.errors import ConfigError, DataError, UnsupportedModelError
from qvit.models.queries import run_with_queries
from qvit.nn.attention import QuantAttention
from qvit.nn.quantizer import Quantizer, code_range
from qvit.nn.rectifier import Rectifier
from qvit.quantization.calibrate import minimum_error_scale


def draw(kind: str, size: int = 3000) -> np.ndarray:
    rng = np.random.default_rng(3)
    return {
        "gaussian": rng.normal(0.3, 1.5, size),
        "laplace": rng.laplace(-0.5, 1.0, size),
        "skewed": rng.gamma(1.5, 1.0, size) - 0.5,
    }[kind]


def squared_error(x: np.ndarray, scale: float, offset: float, low: int, high: int) -> float:
    codes = np.round(np.clip((x - offset) / scale, low, high))
    return float(np.mean((scale * codes + offset - x) ** 2))


def grid_search(x: np.ndarray, low: int, high: int, with_offset: bool) -> float:
    """The smallest error over a dense grid of lower and upper ends of the range."""
    ends = np.linspace(x.min(), x.max(), 50)
    best = np.inf
    if with_offset:
        for i, first in enumerate(ends[:-1]):
            for last in ends[i + 1 :]:
                scale = (last - first) / (high - low)
                best = min(best, squared_error(x, scale, first - scale * low, low, high))
    else:
        for scale in np.linspace(0.005, 1.05, 600) * np.abs(x).max() / max(high, 1):
            best = min(best, squared_error(x, scale, 0.0, low, high))
    return best


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "skewed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_offset", [True, False])
def test_scale_is_as_good_as_a_dense_grid_search(kind: str, bits: int, with_offset: bool) -> None:
    x = draw(kind)
    low, high = code_range(bits)
    scale, offset = minimum_error_scale(torch.tensor(x)[None], low, high, with_offset=with_offset)
    assert with_offset or offset.item() == 0
    found = squared_error(x, scale.item(), offset.item(), low, high)
    assert found <= 1.05 * grid_search(x, low, high, with_offset)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_scale_is_as_good_as_a_dense_grid_search(bits: int) -> None:
    x = np.random.default_rng(0).dirichlet(np.full(17, 0.4), 200).ravel()  # an attention map
    low, high = code_range(bits, signed=False)
    scale, _ = minimum_error_scale(torch.tensor(x)[None], low, high, with_offset=False)
    best = min(squared_error(x, s, 0.0, low, high) for s in np.linspace(0.01, 1.05, 1000) / high)
    assert squared_error(x, scale.item(), 0.0, low, high) <= 1.03 * best


def test_rows_are_fitted_independently_of_each_other() -> None:
    x = torch.tensor(np.stack([draw("gaussian"), 100 * draw("skewed"), 1e-3 * draw("laplace")]))
    together = minimum_error_scale(x, -8, 7, with_offset=True)
    for row in range(3):
        alone = minimum_error_scale(x[row : row + 1], -8, 7, with_offset=True)
        torch.testing.assert_close(together[0][row], alone[0][0])
        torch.testing.assert_close(together[1][row], alone[1][0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-20, 1e20])
def test_constant_row_is_represented_by_a_positive_finite_scale(bits: int, with_offset: bool, value: float) -> None:
    low, high = code_range(bits)
    x = torch.full((1, 40), value)
    scale, offset = minimum_error_scale(x, low, high, with_offset=with_offset)
    assert 0 < scale.item() < float("inf")
    quantizer = Quantizer(bits, offset=with_offset)
    quantizer.set(scale, offset)
    assert quantizer.calibrated
    torch.testing.assert_close(quantizer(x), x, rtol=1e-5, atol=0)


def test_row_of_two_values_is_exact() -> None:
    x = torch.tensor([[-1.0, 4.0] * 20])
    quantizer = Quantizer(2)
    quantizer.set(*minimum_error_scale(x, -2, 1, with_offset=True))
    torch.testing.assert_close(quantizer(x), x, rtol=1e-5, atol=1e-5)


# --- whole models -----------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("rectifier", ["head", None])
def test_calibrated_eight_bit_student_is_close_to_the_float_model(vit: nn.Module, images: Tensor, rectifier) -> None:
    student = quantize(vit, QuantConfig(8, 8, rectifier=rectifier))
    calibrate(student, [images])
    with torch.no_grad():
        assert relative_error(student(images), vit(images)) < 0.05


def test_error_falls_with_every_bit(vit: nn.Module, images: Tensor) -> None:
    errors = []
    for bits in (2, 4, 6, 8):
        student = quantize(vit, QuantConfig(bits, bits))
        calibrate(student, [images])
        with torch.no_grad():
            errors.append(relative_error(student(images), vit(images)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        _, queries, keys = run_with_queries(model, images)
    return [(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) for q, k in zip(queries, keys, strict=True)]


@pytest.mark.parametrize("rectifier", ["head", "token"])
def test_fitted_start_has_attention_nearer_to_the_teachers_than_unit(vit: nn.Module, images: Tensor, rectifier) -> None:
    teacher_maps = attention_maps(vit, images)
    distance = {}
    for init in ("teacher", "unit"):
        student = quantize(vit, QuantConfig(8, 8, rectifier=rectifier))
        calibrate(student, [images], rectifier_init=init)
        maps = attention_maps(student, images)
        distance[init] = sum((a - b).abs().mean().item() for a, b in zip(maps, teacher_maps, strict=True))
    assert distance["teacher"] < (0.2 if rectifier == "head" else 0.9) * distance["unit"]


def test_unit_start_has_gamma_one_and_beta_zero_and_fitted_statistics(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit)
    calibrate(student, [images], rectifier_init="unit")
    rectifiers = [m for m in student.modules() if isinstance(m, Rectifier)]
    assert len(rectifiers) == 4
    for rectifier in rectifiers:
        assert bool((rectifier.gamma == 1).all())
        assert bool((rectifier.beta == 0).all())
        assert not bool((rectifier.running_var == 1).any())


def test_every_quantizer_is_calibrated_and_enabled_afterwards(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit)
    calibrate(student, [images])
    quantizers = [m for m in student.modules() if isinstance(m, Quantizer)]
    assert len(quantizers) == 2 * (2 + 4 * 2) + 4 * 2  # two a linear layer, four an attention
    assert all(q.calibrated and q.enabled and bool(torch.isfinite(q.scale).all()) for q in quantizers)
    assert all(not m._forward_pre_hooks for m in student.modules())


def test_weight_scales_minimise_the_error_a_row(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit, QuantConfig(3, 3))
    calibrate(student, [images])
    layer = student.blocks[0].mlp.fc1
    row = layer.weight[5].detach().double().numpy()
    found = squared_error(row, layer.weight_quantizer.scale[5].item(), 0.0, -4, 3)
    assert found <= 1.05 * grid_search(row, -4, 3, with_offset=False)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 16, 16)]])
def test_no_images_is_a_data_error(vit: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(DataError, match="at least one image"):
        calibrate(quantize(vit), batches)


@pytest.mark.parametrize("rectifier", ["head", "token", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_with_nan_is_a_data_error_and_leaves_the_mode(vit: nn.Module, images: Tensor, rectifier, value) -> None:
    student = quantize(vit, QuantConfig(rectifier=rectifier)).train()
    images[3, 1, 7, 7] = value
    with pytest.raises(DataError, match="NaN or an infinity at "):
        calibrate(student, [images])
    assert student.training
    # a second try with good images is not spoilt by the first
    calibrate(student, [torch.nan_to_num(images, posinf=0.0)])
    assert bool(torch.isfinite(student.eval()(torch.randn(2, 3, 16, 16))).all())


def test_model_that_cannot_run_leaves_the_mode(vit: nn.Module) -> None:
    student = quantize(vit).train()
    with pytest.raises(Exception, match="size|shape|height"):
        calibrate(student, [torch.zeros(2, 3, 20, 20)])
    assert student.training
    assert all(m.enabled for m in student.modules() if isinstance(m, (Quantizer, Rectifier)))


def test_float_model_has_nothing_to_calibrate(vit: nn.Module, images: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="no quantizers"):
        calibrate(vit, [images])


def test_unknown_start_is_refused(vit: nn.Module, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="rectifier_init must be"):
        calibrate(quantize(vit), [images], rectifier_init="zero")


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_calibrating_twice_gives_the_same_result(vit: nn.Module, images: Tensor, rectifier) -> None:
    student = quantize(vit, QuantConfig(rectifier=rectifier))
    calibrate(student, [images])
    first = copy.deepcopy(student.state_dict())
    calibrate(student, [images])
    assert all(torch.equal(value, first[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_float_weights_are_untouched(vit: nn.Module, images: Tensor, training: bool) -> None:
    student = quantize(vit).train(training)
    calibrate(student, [images])
    assert student.training is training
    assert all(m.training is training for m in student.modules())
    state = student.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())


def test_batches_may_be_any_iterable_of_images_or_of_tuples_that_start_with_them(
    vit: nn.Module, images, labels
) -> None:
    results = []
    for batches in ([images], [(images, labels)], ([images, labels] for _ in range(1))):
        student = quantize(vit)
        calibrate(student, batches)
        results.append(student(images))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_split_of_the_images_into_batches_hardly_matters(vit: nn.Module, images: Tensor) -> None:
    logits = []
    for batches in ([images], list(images.split(5))):
        student = quantize(vit, QuantConfig(8, 8))
        calibrate(student, batches)
        logits.append(student(images).detach())
    assert relative_error(logits[1], logits[0]) < 0.05


def test_heads_have_scales_of_their_own(make_model, images: Tensor) -> None:
    teacher = make_model()
    with torch.no_grad():
        teacher.blocks[0].attn.qkv.weight[:12] *= 4  # queries of head 0
        teacher.blocks[0].attn.qkv.bias[:12] *= 4
    student = quantize(teacher)
    calibrate(student, [images])
    attention = student.blocks[0].attn
    assert isinstance(attention, QuantAttention)
    first, second = attention.query_quantizer.scale.flatten().tolist()
    assert first > 2 * second


@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_constant_images_give_a_student_that_runs(vit: nn.Module, constant: float) -> None:
    student = quantize(vit, QuantConfig(8, 8))
    calibrate(student, [torch.full((4, 3, 16, 16), constant)])
    assert bool(torch.isfinite(student(torch.randn(2, 3, 16, 16))).all())
    with torch.no_grad():
        flat = torch.full((2, 3, 16, 16), constant)
        assert relative_error(student(flat), vit(flat)) < 0.05


def test_zero_weights_give_a_student_that_runs(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.weight.zero_()  # a fresh residual branch
        vit.blocks[0].attn.qkv.weight[3].zero_()  # a pruned channel
    student = quantize(vit)
    calibrate(student, [images])
    assert bool(torch.isfinite(student(images)).all())


def test_lsq_start_of_the_weights_is_its_formula(vit: nn.Module, images: Tensor) -> None:
    student, other = quantize(vit, QuantConfig(3, 3)), quantize(vit, QuantConfig(3, 3))
    calibrate(student, [images], weight_init="lsq")
    calibrate(other, [images])
    linear = student.blocks[0].mlp.fc1  # type: ignore[union-attr, index]
    expected = 2 * linear.weight.abs().mean(dim=1) / math.sqrt(3)
    torch.testing.assert_close(linear.weight_quantizer.scale.flatten(), expected)
    modules, other_modules = (dict(model.named_modules()) for model in (student, other))
    for name, module in modules.items():
        if isinstance(module, Quantizer) and module.batched:  # activations are fitted as ever
            torch.testing.assert_close(module.scale, other_modules[name].scale)
    with pytest.raises(ConfigError, match="weight_init must be minimum_error or lsq, not 'max'"):
        calibrate(student, [images], weight_init="max")  # type: ignore[arg-type]


def test_kept_rectifiers_are_left_alone(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit)
    calibrate(student, [images])
    rectifiers = [m for m in student.modules() if isinstance(m, Rectifier)]
    with torch.no_grad():
        for rectifier in rectifiers:
            rectifier.gamma.mul_(1.5)
    before = [{name: value.clone() for name, value in r.state_dict().items()} for r in rectifiers]
    calibrate(student, [images], rectifier_init="keep")
    for rectifier, was in zip(rectifiers, before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in rectifier.state_dict().items())
