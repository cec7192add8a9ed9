from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import jobs
from qvit.nn import rectifier
from qvit.nn.rectifier import EPS, MOMENTUM, HeadRectifier, Rectifier, TokenRectifier, make_rectifier

B, H, N, D = 3, 2, 5, 4


def sample(*, dtype: torch.dtype = torch.float64, batch: int = B, seed: int = 0) -> Tensor:
    """Queries whose heads, tokens and channels differ in mean and spread."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2, (1, H, 1, 1)) * rng.uniform(0.5, 2, (1, 1, N, 1)) * rng.uniform(0.5, 2, (1, 1, 1, D))
    shift = rng.normal(0, 1, (1, H, 1, D))
    return torch.tensor(rng.normal(size=(batch, H, N, D)) * spread + shift, dtype=dtype)


def randomise(rectifier: Rectifier) -> None:
    rng = np.random.default_rng(7)
    with torch.no_grad():
        rectifier.gamma.copy_(torch.tensor(rng.uniform(0.5, 1.5, (H, 1, D))))
        rectifier.beta.copy_(torch.tensor(rng.normal(0, 0.5, (H, 1, D))))


def formula(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, over: str) -> np.ndarray:
    """(q - mu + beta) / (gamma sqrt(var + eps)) value by value, with the plain definitions of mu and var."""
    out = np.zeros_like(x)
    for b, h, n, d in np.ndindex(x.shape):
        values = (x[b, h, n] if over == "token" else x[:, h]).ravel()
        mu = sum(values) / len(values)
        var = sum((v - mu) ** 2 for v in values) / len(values)
        out[b, h, n, d] = (x[b, h, n, d] - mu + beta[h, 0, d]) / (gamma[h, 0, d] * (var + 1e-6) ** 0.5)
    return out


@pytest.mark.parametrize(("kind", "cls"), [("head", HeadRectifier), ("token", TokenRectifier)])
def test_make_rectifier_names_both_readings(kind: str, cls: type) -> None:
    assert type(make_rectifier(kind, H, D)) is cls


def test_no_rectification_is_the_identity() -> None:
    x = sample()
    assert make_rectifier(None, H, D)(x) is x


@pytest.mark.parametrize("kind", ["head", "token"])
def test_training_forward_matches_float64_formula(kind: str) -> None:
    rectifier = make_rectifier(kind, H, D).train()
    randomise(rectifier)
    x = sample()
    expected = formula(x.numpy(), *(p.detach().double().numpy() for p in (rectifier.gamma, rectifier.beta)), kind)
    np.testing.assert_allclose(rectifier(x).detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_gradients_match_finite_differences_through_the_statistics(kind: str) -> None:
    rectifier = make_rectifier(kind, H, D).train()
    randomise(rectifier)
    # the parameters are float32 by design: the same module with float64 ones instead
    gamma, beta = (p.detach().double().requires_grad_(True) for p in (rectifier.gamma, rectifier.beta))
    del rectifier.gamma, rectifier.beta

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        rectifier.gamma, rectifier.beta = gamma, beta
        return rectifier(x)

    x = sample(batch=2).requires_grad_(True)
    assert torch.autograd.gradcheck(function, (x, gamma, beta))


@pytest.mark.parametrize("kind", ["head", "token"])
def test_statistics_are_biased_and_of_the_stated_shape(kind: str) -> None:
    rectifier = make_rectifier(kind, H, D).train()
    x = sample()
    mean, variance = rectifier.statistics(x)
    axes = (0, 2, 3) if kind == "head" else (3,)
    assert mean.shape == variance.shape == ((H, 1, 1) if kind == "head" else (B, H, N, 1))
    np.testing.assert_allclose(mean.squeeze(), x.numpy().mean(axes), rtol=1e-12)
    np.testing.assert_allclose(variance.squeeze(), x.numpy().var(axes, ddof=0), rtol=1e-12)


def test_token_reading_is_the_same_in_training_and_evaluation() -> None:
    rectifier, x = TokenRectifier(H, D), sample()
    assert torch.equal(rectifier.train()(x), rectifier.eval()(x))
    assert not list(rectifier.buffers())


def test_head_reading_uses_the_batch_in_training_and_the_running_averages_in_evaluation() -> None:
    rectifier, x = HeadRectifier(H, D), sample()
    trained = rectifier.train()(x)
    assert trained.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    rectifier.running_mean.copy_(torch.tensor([1.0, -2.0]).reshape(H, 1, 1))
    rectifier.running_var.copy_(torch.tensor([4.0, 9.0]).reshape(H, 1, 1))
    before = copy.deepcopy(rectifier.state_dict())
    evaluated = rectifier.eval()(x)
    expected = (x - torch.tensor([1.0, -2.0]).reshape(H, 1, 1)) / torch.tensor([2.0, 3.0]).reshape(H, 1, 1)
    torch.testing.assert_close(evaluated, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert all(torch.equal(v, before[k]) for k, v in rectifier.state_dict().items())  # evaluation learns nothing


def test_evaluation_of_the_head_reading_does_not_depend_on_the_other_images() -> None:
    rectifier, x = HeadRectifier(H, D), sample()
    rectifier.fit(x)
    rectifier.eval()
    torch.testing.assert_close(rectifier(x)[:1], rectifier(x[:1]), rtol=0, atol=0)


def test_running_averages_move_by_a_tenth_of_the_way() -> None:
    rectifier = HeadRectifier(H, D).train()
    mean, variance = np.zeros(H), np.ones(H)
    for seed in range(3):
        x = sample(seed=seed)
        rectifier(x)
        mean = 0.9 * mean + 0.1 * x.numpy().mean((0, 2, 3))
        variance = 0.9 * variance + 0.1 * x.numpy().var((0, 2, 3))
    assert MOMENTUM == 0.1
    np.testing.assert_allclose(rectifier.running_mean.squeeze(), mean, rtol=1e-5)
    np.testing.assert_allclose(rectifier.running_var.squeeze(), variance, rtol=1e-5)


def test_running_averages_carry_no_graph() -> None:
    rectifier = HeadRectifier(H, D).train()
    x = sample(dtype=torch.float32).requires_grad_(True)
    rectifier(x).sum().backward()
    assert not rectifier.running_mean.requires_grad
    rectifier(x).sum().backward()  # a second step does not go back through the first


def test_head_fit_gives_the_queries_back_in_evaluation() -> None:
    rectifier, x = HeadRectifier(H, D).eval(), sample(dtype=torch.float32)
    rectifier.fit(x)
    torch.testing.assert_close(rectifier(x), x, rtol=1e-5, atol=1e-5)
    # on data that the fit has not seen too: it is one affine map
    other = 3 * sample(dtype=torch.float32, seed=9)
    torch.testing.assert_close(rectifier(other), other, rtol=1e-5, atol=1e-5)


def test_token_fit_is_the_least_squares_optimum_of_every_channel() -> None:
    rectifier, x = TokenRectifier(H, D), sample(batch=8)
    rectifier.fit(x)
    got = rectifier(x).detach().numpy()
    data = x.numpy()
    mu, s = data.mean(-1), np.sqrt(data.var(-1) + EPS)
    for h, d in np.ndindex(H, D):
        design = np.stack([((data[:, h, :, d] - mu[:, h]) / s[:, h]).ravel(), (1 / s[:, h]).ravel()], axis=1)
        (a, c), residual, *_ = np.linalg.lstsq(design, data[:, h, :, d].ravel(), rcond=None)
        assert a > 0
        assert rectifier.gamma[h, 0, d].item() == pytest.approx(1 / a, rel=1e-5)
        assert rectifier.beta[h, 0, d].item() == pytest.approx(c / a, rel=1e-4, abs=1e-5)
        assert ((got[:, h, :, d] - data[:, h, :, d]) ** 2).sum() == pytest.approx(residual[0], rel=1e-5)


def test_token_fit_is_nearer_to_the_queries_than_the_unit_start() -> None:
    rectifier, x = TokenRectifier(H, D), sample(batch=8)
    unit = (rectifier(x) - x).square().mean()
    rectifier.fit(x)
    assert (rectifier(x) - x).square().mean() < 0.75 * unit


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("degenerate", ["channel", "head", "all", "zero"])
def test_fit_survives_constant_channels_and_heads(kind: str, degenerate: str) -> None:
    x = sample(batch=8, dtype=torch.float32)
    if degenerate == "channel":
        x[..., 1] = 0.7
    elif degenerate == "head":
        x[:, 0] = 0.7
    else:
        x[:] = 0.7 if degenerate == "all" else 0.0
    rectifier = make_rectifier(kind, H, D).eval()
    rectifier.fit(x)
    assert all(bool(torch.isfinite(p).all()) for p in rectifier.state_dict().values())
    assert bool((rectifier.gamma > 0).all())
    out = rectifier(x)
    assert bool(torch.isfinite(out).all())
    if degenerate in ("all", "zero"):
        torch.testing.assert_close(out, x, rtol=1e-3, atol=1e-3)
    elif degenerate == "head":
        torch.testing.assert_close(out[:, 0], x[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_rectifier_stays_float32_when_moved_and_returns_the_dtype_of_its_input(kind: str) -> None:
    rectifier = make_rectifier(kind, H, D)
    randomise(rectifier)
    before = copy.deepcopy(rectifier.state_dict())
    nn.Sequential(rectifier).half()
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in rectifier.state_dict().items())
    x = sample(dtype=torch.float32)
    assert rectifier(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert rectifier(x).dtype == torch.float32


def test_gradient_of_the_head_reading_ignores_shift_and_scale_of_the_batch() -> None:
    """With statistics of the batch q~ does not change when all queries move or grow together: no gradient there."""
    rectifier = HeadRectifier(H, D).train()
    x = sample().requires_grad_(True)
    (rectifier(x) * torch.randn(B, H, N, D, dtype=torch.float64)).sum().backward()
    assert x.grad.sum(dim=(0, 2, 3)).abs().max() < 1e-9
    assert ((x.grad * x).sum(dim=(0, 2, 3))).abs().max() < 1e-4  # eps is all that is left


SIZES = (2, 5)


def _one_process(folder: Path) -> None:
    rank = dist.get_rank()
    joined, weights = sample(batch=sum(SIZES)), sample(batch=sum(SIZES), seed=5)
    x = joined.split(SIZES)[rank].clone().requires_grad_(True)
    rectifier = HeadRectifier(H, D).train()
    randomise(rectifier)
    out = rectifier(x)
    (out * weights.split(SIZES)[rank]).sum().backward()
    if rank == 0:
        rectifier.eval()(x)  # evaluation does not communicate: nobody would answer
    buffers = dict(rectifier.named_buffers())
    result = {"out": out.detach(), "x": x.grad, "gamma": rectifier.gamma.grad, "buffers": buffers}
    torch.save(result, folder / f"{rank}.pt")


def test_two_processes_give_statistics_and_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    jobs.together(_one_process, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    x = sample(batch=sum(SIZES)).requires_grad_(True)
    rectifier = HeadRectifier(H, D).train()
    randomise(rectifier)
    out = rectifier(x)
    (out * sample(batch=sum(SIZES), seed=5)).sum().backward()
    torch.testing.assert_close(torch.cat([p["out"] for p in parts]), out.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([p["x"] for p in parts]), x.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts[0]["gamma"] + parts[1]["gamma"], rectifier.gamma.grad, rtol=1e-5, atol=1e-5)
    for name, buffer in rectifier.named_buffers():
        for part in parts:
            torch.testing.assert_close(part["buffers"][name], buffer)


def test_what_would_keep_a_group_of_processes_is_imported_before_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch imports it at the first collective, and the group of that moment is a default of its functions."""
    monkeypatch.delitem(sys.modules, "torch.distributed.nn.functional", raising=False)
    runpy.run_path(rectifier.__file__)
    functional = sys.modules["torch.distributed.nn.functional"]
    assert functional.all_reduce.__defaults__[-1] is None
