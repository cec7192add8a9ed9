from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qvit import QuantConfig, quantize
from qvit.errors import UncalibratedError
from qvit.nn.quantizer import Quantizer, code_range, fake_quantize, from_codes, to_codes

# (scale shape, input shape, first dimension is the batch)
SHAPES = {
    "per_tensor": ((), (3, 5, 8), True),
    "per_head": ((2, 1, 1), (3, 2, 5, 4), True),
    "per_channel": ((6, 1), (6, 10), False),
}


def reference(x, scale, offset, low, high, upstream):
    """The forward pass and the LSQ+ gradients in float64, element by element, from the papers' case distinctions."""
    scale, has_offset = np.broadcast_to(scale, x.shape), offset is not None
    offset = np.broadcast_to(offset if has_offset else 0.0, x.shape)
    value, d_x, d_scale, d_offset = (np.zeros(x.shape) for _ in range(4))
    for i in np.ndindex(x.shape):
        v = (float(x[i]) - float(offset[i])) / float(scale[i])
        if v < low:
            code, d_x[i], d_scale[i], d_offset[i] = low, 0.0, low, 1.0
        elif v > high:
            code, d_x[i], d_scale[i], d_offset[i] = high, 0.0, high, 1.0
        else:
            floor = math.floor(v)
            rest = v - floor
            up = rest > 0.5 or (rest == 0.5 and floor % 2 == 1)
            code = floor + up
            d_x[i], d_scale[i], d_offset[i] = 1.0, code - v, 0.0
        value[i] = float(scale[i]) * code + float(offset[i])
    return value, d_x * upstream, d_scale * upstream, d_offset * upstream


def group_sum(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add up what shares one scale."""
    total = np.zeros(shape)
    lead = values.ndim - len(shape)
    for i in np.ndindex(values.shape):
        total[tuple(0 if size == 1 else k for k, size in zip(i[lead:], shape, strict=True))] += values[i]
    return total


def case(shape_name: str, bits: int, signed: bool, offset: bool):
    scale_shape, x_shape, _ = SHAPES[shape_name]
    rng = np.random.default_rng(bits)
    low, high = code_range(bits, signed=signed)
    scale = rng.uniform(0.05, 0.2, scale_shape)
    z = rng.normal(0, 0.3, scale_shape) if offset else None
    # about a third of the values lies outside the range, on both sides
    middle = scale * (low + high) / 2 + (0 if z is None else z)
    x = middle + scale * (high - low) * rng.normal(0, 0.5, x_shape)
    return x, scale, z, low, high, rng.normal(size=x_shape)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "width"), [(True, 1), (False, 0)])
def test_code_range_is_twos_complement_or_unsigned(bits: int, signed: bool, width: int) -> None:
    low, high = code_range(bits, signed=signed)
    assert high - low == 2**bits - 1
    assert low == -width * 2 ** (bits - 1)


@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("offset", [True, False])
def test_fake_quantize_matches_float64_formula(shape_name: str, bits: int, signed: bool, offset: bool) -> None:
    x, scale, z, low, high, upstream = case(shape_name, bits, signed, offset)
    expected, d_x, d_scale, d_offset = reference(x, scale, z, low, high, upstream)
    inputs = [None if a is None else torch.tensor(a, requires_grad=True) for a in (x, scale, z)]
    got = fake_quantize(*inputs, low, high, gradient_scale=0.25)
    got.backward(torch.tensor(upstream))
    assert 0.05 < np.mean(d_x == 0) < 0.9  # the case distinction is exercised
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(inputs[0].grad, d_x, rtol=1e-12)
    np.testing.assert_allclose(inputs[1].grad, 0.25 * group_sum(d_scale, scale.shape), rtol=1e-9, atol=1e-12)
    if offset:
        np.testing.assert_allclose(inputs[2].grad, 0.25 * group_sum(d_offset, z.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "offset"), [(True, True), (True, False), (False, False)])
def test_quantizer_matches_float64_formula_with_lsq_gradient_scale(shape_name, bits, signed, offset) -> None:
    scale_shape, x_shape, batched = SHAPES[shape_name]
    x, scale, z, low, high, upstream = case(shape_name, bits, signed, offset)
    quantizer = Quantizer(bits, scale_shape, signed=signed, offset=offset, batched=batched)
    quantizer.set(torch.tensor(scale), None if z is None else torch.tensor(z))
    scale = quantizer.scale.detach().double().numpy()  # what float32 made of it
    z = None if z is None else quantizer.offset.detach().double().numpy()
    expected, d_x, d_scale, d_offset = reference(x, scale, z, low, high, upstream)

    image = x_shape[1:] if batched else x_shape
    sharing = math.prod(image) / math.prod(scale_shape)
    qp = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    g = 1 / math.sqrt(sharing * qp)

    leaf = torch.tensor(x, requires_grad=True)
    got = quantizer(leaf)
    got.backward(torch.tensor(upstream))
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(leaf.grad, d_x, rtol=1e-12)
    # d loss / d log scale = d loss / d scale * scale
    np.testing.assert_allclose(
        quantizer.log_scale.grad, g * scale * group_sum(d_scale, scale_shape), rtol=1e-4, atol=1e-6
    )
    if offset:
        np.testing.assert_allclose(quantizer.offset.grad, g * group_sum(d_offset, scale_shape), rtol=1e-4, atol=1e-6)


def test_quantizer_agrees_with_the_formula_in_float32() -> None:
    x, scale, z, low, high, upstream = case("per_head", 4, True, True)
    quantizer = Quantizer(4, (2, 1, 1))
    quantizer.set(torch.tensor(scale), torch.tensor(z))
    expected = reference(x.astype(np.float32), scale, z, low, high, upstream)[0]
    got = quantizer(torch.tensor(x, dtype=torch.float32)).detach()
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_scale_and_offset_gradients_are_finite_differences_where_all_values_are_clipped(signed: bool, sign: int):
    low, high = code_range(3, signed=signed)
    x = sign * torch.linspace(50, 60, 12, dtype=torch.float64).reshape(2, 6)
    weights = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(2, 6)
    scale = torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([[0.2], [-0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, z: (fake_quantize(x, s, z, low, high) * weights).sum(), (scale, offset))


def test_log_scale_gradient_is_the_finite_difference_where_all_values_are_clipped() -> None:
    quantizer = Quantizer(3, offset=False)
    x = torch.full((1, 4), 100.0, dtype=torch.float64)
    quantizer.set(torch.tensor(0.5))
    quantizer(x).sum().backward()
    values = []
    for step in (1e-2, -1e-2):
        quantizer.set(torch.tensor(0.5 * math.exp(step)))
        values.append(quantizer(x).sum().item())
    g = 1 / math.sqrt(4 * 3)
    assert quantizer.log_scale.grad.item() == pytest.approx(g * (values[0] - values[1]) / 2e-2, rel=1e-3)


def test_gradient_scale_does_not_depend_on_the_batch() -> None:
    quantizer = Quantizer(4)
    quantizer.set(torch.tensor(0.1))
    x = torch.randn(8, 5, 6)
    quantizer(x).sum().backward()
    whole = quantizer.log_scale.grad.clone()
    quantizer.log_scale.grad = None
    for part in x.split(2):  # gradient accumulation
        quantizer(part).sum().backward()
    torch.testing.assert_close(quantizer.log_scale.grad, whole)


any_float = st.floats(width=32, allow_nan=False)
extreme = st.one_of(any_float, st.sampled_from([1e30, -1e30, 3.4e38, 1e-45, -1e-45, 0.0, -0.0, math.inf, -math.inf]))
widths = st.tuples(st.integers(2, 8), st.booleans())
scales = st.floats(1e-6, 1e6)


@settings(max_examples=150, deadline=None)
@given(st.lists(extreme, min_size=1, max_size=8), widths, scales, st.floats(-1e6, 1e6))
def test_codes_are_whole_numbers_in_range_for_any_input(values, width, scale, offset) -> None:
    bits, signed = width
    quantizer = Quantizer(bits, signed=signed)
    quantizer.set(torch.tensor(scale), torch.tensor(offset))
    x = torch.tensor(values, dtype=torch.float32)
    codes = to_codes(x, quantizer.scale, quantizer.offset, quantizer.low, quantizer.high)
    assert bool((codes == codes.round()).all())
    assert quantizer.low <= codes.min() <= codes.max() <= quantizer.high
    integers = quantizer.codes(x)
    assert integers.dtype == torch.int16
    assert torch.equal(integers.float(), codes.detach())
    assert bool(torch.isfinite(quantizer(x)).all())


@settings(max_examples=150, deadline=None)
@given(st.lists(extreme, min_size=1, max_size=8), widths, scales, st.floats(-100, 100))
def test_quantizing_twice_changes_nothing(values, width, scale, offset_in_steps) -> None:
    bits, signed = width
    quantizer = Quantizer(bits, signed=signed)
    quantizer.set(torch.tensor(scale), torch.tensor(scale * offset_in_steps))
    once = quantizer(torch.tensor(values, dtype=torch.float32))
    assert torch.equal(quantizer(once), once)


@settings(max_examples=100, deadline=None)
@given(st.integers(-128, 126), st.integers(-8, 8))
def test_halves_round_to_the_even_code(whole: int, exponent: int) -> None:
    scale = torch.tensor(2.0**exponent)
    code = to_codes((whole + 0.5) * scale, scale, None, -128, 127)
    assert int(code) == (whole if whole % 2 == 0 else whole + 1)


def test_codes_and_values_are_inverse_on_the_grid() -> None:
    codes = torch.arange(-8.0, 8.0)
    scale, offset = torch.tensor(0.37), torch.tensor(-1.3)
    assert torch.equal(to_codes(from_codes(codes, scale, offset), scale, offset, -8, 7), codes)


def test_float_output_is_what_the_integer_codes_stand_for() -> None:
    quantizer = Quantizer(3, (2, 1, 1))
    quantizer.set(torch.tensor([0.1, 0.4]), torch.tensor([0.05, -0.2]))
    x = torch.randn(4, 2, 5, 3)
    assert torch.equal(quantizer(x), from_codes(quantizer.codes(x), quantizer.scale, quantizer.offset))


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.1), (torch.optim.Adam, 0.5)])
def test_scale_stays_positive_under_violent_optimizer_steps(optimizer, lr: float) -> None:
    quantizer = Quantizer(2, (2, 1, 1))
    quantizer.set(torch.tensor([0.5, 2.0]))
    steps = optimizer(quantizer.parameters(), lr=lr)
    smallest, largest = math.inf, 0.0
    for step in range(60):
        x = torch.randn(4, 2, 5, 3)
        steps.zero_grad()
        # pulls the scale down for 40 steps, then up
        (quantizer(x).square().sum() * (1 if step < 40 else -0.1)).backward()
        steps.step()
        assert bool(torch.isfinite(quantizer(x)).all())
        smallest, largest = (
            min(smallest, quantizer.scale.min().item()),
            max(largest, quantizer.scale.max().item()),
        )
    assert smallest < 0.1  # it was really pulled


@settings(max_examples=50, deadline=None)
@given(st.floats(-80, 80))
def test_scale_is_positive_and_finite_wherever_a_step_lands(log_scale: float) -> None:
    quantizer = Quantizer(4)
    quantizer.set(torch.tensor(1.0))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer.log_scale.grad = torch.tensor(-log_scale)
    optimizer.step()
    assert 0 < quantizer.scale.item() < math.inf
    assert bool(torch.isfinite(quantizer(torch.tensor([[-3.0, 0.0, 1e-3, 7.0]]))).all())


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.type(torch.float16)]
)
def test_scale_and_offset_stay_float32_and_unchanged_when_the_model_is_moved(move) -> None:
    quantizer = Quantizer(4, (2, 1, 1))
    quantizer.set(torch.tensor([0.1234567, 7.654321]), torch.tensor([0.3333333, -1.1111111]))
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    model = nn.Sequential(nn.Linear(3, 3), quantizer)
    move(model)
    assert model[0].weight.dtype != torch.float32
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    assert {value.dtype for value in quantizer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    quantizer = Quantizer(4)
    quantizer.set(torch.tensor(0.1))
    x = torch.randn(2, 5).to(dtype).requires_grad_(True)
    out = quantizer(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert quantizer.log_scale.grad.dtype == torch.float32


def test_arithmetic_is_float32_under_autocast() -> None:
    quantizer = Quantizer(8)
    quantizer.set(torch.tensor(0.0137), torch.tensor(0.321))
    x = torch.randn(4, 50)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, quantizer(x))


def test_running_before_calibration_says_what_to_do() -> None:
    with pytest.raises(UncalibratedError, match=r"qvit\.calibrate"):
        Quantizer(4)(torch.ones(2, 2))


def test_uncalibrated_student_refuses_to_run(vit: nn.Module, images: Tensor) -> None:
    with pytest.raises(UncalibratedError):
        quantize(vit)(images)


def test_calibrated_only_when_every_scale_is_finite() -> None:
    quantizer = Quantizer(4, (2, 1, 1))
    assert not quantizer.calibrated
    quantizer.set(torch.tensor([0.1, math.nan]))
    assert not quantizer.calibrated
    quantizer.set(torch.tensor([0.1, 0.2]))
    assert quantizer.calibrated


def test_state_dict_round_trip_keeps_values_and_calibration() -> None:
    trained, fresh = Quantizer(3, (2, 1, 1)), Quantizer(3, (2, 1, 1))
    trained.set(torch.tensor([0.1, 0.3]), torch.tensor([-0.2, 0.4]))
    fresh.load_state_dict(trained.state_dict())
    x = torch.randn(2, 2, 4, 3)
    assert fresh.calibrated
    assert torch.equal(fresh(x), trained(x))
    fresh.load_state_dict(Quantizer(3, (2, 1, 1)).state_dict())
    assert not fresh.calibrated


def test_deepcopy_is_equal_and_independent() -> None:
    quantizer = Quantizer(3)
    quantizer.set(torch.tensor(0.1), torch.tensor(0.2))
    other = copy.deepcopy(quantizer)
    x = torch.randn(3, 4)
    before = quantizer(x)
    assert other.calibrated
    assert torch.equal(other(x), before)
    other.set(torch.tensor(5.0))
    assert torch.equal(quantizer(x), before)


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_float_state_dict_loads_strictly_and_leaves_no_scale(make_model, images: Tensor, rectifier) -> None:
    from qvit import calibrate

    teacher = make_model()
    student = quantize(teacher, QuantConfig(rectifier=rectifier))
    student.load_state_dict(teacher.state_dict(), strict=True)
    assert not student.blocks[0].attn.qkv.input_quantizer.calibrated
    calibrate(student, [images])
    before = student(images)
    student.load_state_dict(teacher.state_dict(), strict=True)
    with pytest.raises(UncalibratedError):
        student(images)
    calibrate(student, [images])
    assert torch.equal(student(images), before)


def test_strict_load_still_reports_a_quantizer_that_is_half_there() -> None:
    quantizer = Quantizer(3)
    with pytest.raises(RuntimeError, match="offset"):
        quantizer.load_state_dict({"log_scale": torch.tensor(0.0)})


def test_extra_repr_says_the_bits() -> None:
    assert "3 bits, unsigned, scales=2" in repr(Quantizer(3, (2, 1, 1), signed=False, offset=False))
