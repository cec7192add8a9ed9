"""The guided distance against its definition, and what it must not do at its ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guidance import by_definition
from qvit.quantization.distill import guided_distance


@pytest.mark.parametrize("teacher_dim", [8, 5, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_distance_equals_the_n_by_n_definition(teacher_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    teacher, student = torch.randn(2, 3, 17, teacher_dim, dtype=dtype), torch.randn(2, 3, 17, 8, dtype=dtype)
    expected = by_definition(teacher, student)
    # the root is smoothed by sqrt(d^2 + eps) - sqrt(eps)
    smoothing = torch.finfo(dtype).eps ** 0.5
    got = guided_distance(teacher, student)
    assert got.shape == (2, 3)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=smoothing)


@pytest.mark.parametrize("teacher_dim", [8, 5, 12])
def test_gradient_equals_that_of_the_n_by_n_definition(teacher_dim: int) -> None:
    teacher = torch.randn(2, 3, 17, teacher_dim, dtype=torch.float64)
    student = torch.randn(2, 3, 17, 8, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(guided_distance(teacher, student).sum(), student)
    (expected,) = torch.autograd.grad(by_definition(teacher, student).sum(), student)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_gradient_is_the_finite_difference() -> None:
    teacher = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    student = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: guided_distance(teacher, b), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [4, 17, 197])
def test_distance_is_exactly_zero_where_student_is_teacher(dtype: torch.dtype, tokens: int) -> None:
    student = torch.randn(2, 3, tokens, 8, dtype=dtype, requires_grad=True)
    distance = guided_distance(student.detach().clone(), student)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros_like(distance))
    assert bool(torch.isfinite(student.grad).all())
    assert student.grad.abs().max() < 1e-3


@pytest.mark.parametrize("noise", [1e-8, 1e-6, 1e-4, 1e-2])
def test_gradient_stays_bounded_near_the_teacher(noise: float) -> None:
    teacher = torch.randn(2, 3, 17, 8)
    student = (teacher + noise * torch.randn_like(teacher)).requires_grad_(True)
    guided_distance(teacher, student).sum().backward()
    assert bool(torch.isfinite(student.grad).all())
    # far from the teacher each element's gradient is below 1 / (root mean square * sqrt(N)): no blow-up here either
    assert student.grad.abs().max() < 1


def test_distance_is_zero_of_the_same_relations_and_root_two_of_none_in_common() -> None:
    x = torch.randn(2, 2, 5, 3)
    turned = x @ torch.linalg.qr(torch.randn(3, 3))[0]
    for same in (x, 7 * x, -x, turned):
        assert guided_distance(x, same).abs().max() < 1e-3
    assert guided_distance(x, torch.randn(2, 2, 5, 3)).min() > 0.1
    apart = torch.zeros(1, 1, 4, 2)
    apart[..., :2, 0] = 1.0
    other = torch.zeros(1, 1, 4, 2)
    other[..., 2:, 0] = 1.0  # other tokens: the Gram matrices share nothing
    assert guided_distance(apart, other).item() == pytest.approx(math.sqrt(2), abs=1e-3)


@pytest.mark.parametrize("factor", [1e-6, 1e-2, 1e3, 1e8])
def test_distance_does_not_depend_on_scale(factor: float) -> None:
    teacher, student = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8)
    expected = guided_distance(teacher, student)
    torch.testing.assert_close(guided_distance(teacher, factor * student), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided_distance(factor * teacher, student), expected, rtol=1e-4, atol=1e-5)


def test_distance_does_not_depend_on_a_rotation_of_the_channels() -> None:
    teacher, student = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    torch.testing.assert_close(
        guided_distance(teacher, student @ rotation), guided_distance(teacher, student), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("zero", ["teacher", "student", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_zero_input_gives_finite_distance_and_gradient(zero: str, dtype: torch.dtype) -> None:
    teacher = torch.zeros(1, 2, 5, 3, dtype=dtype) if zero != "student" else torch.randn(1, 2, 5, 3, dtype=dtype)
    student = torch.zeros(1, 2, 5, 3, dtype=dtype) if zero != "teacher" else torch.randn(1, 2, 5, 3, dtype=dtype)
    student.requires_grad_(True)
    distance = guided_distance(teacher, student)
    distance.sum().backward()
    assert bool((distance <= math.sqrt(2)).all())
    assert bool(torch.isfinite(student.grad).all())


def test_distance_is_computed_in_float32_under_autocast_and_from_half_inputs() -> None:
    teacher, student = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8)
    expected = guided_distance(teacher, student)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guided_distance(teacher, student), expected)
    half = guided_distance(teacher.half(), student.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=1e-3)


def saved_bytes(tokens: int) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    student = torch.randn(1, 2, tokens, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        guided_distance(torch.randn(1, 2, tokens, 16), student).sum()
    return total


def test_memory_for_the_backward_pass_grows_linearly_with_tokens() -> None:
    small, large = saved_bytes(197), saved_bytes(785)
    assert small > 0
    assert large / small <= 4.2
    assert large < 785 * 785 * 4  # less than a single N x N matrix
