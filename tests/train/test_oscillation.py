import numpy as np
import pytest
import torch
from torch import nn

from qvit.config import Bits
from qvit.nn.linear import QuantLinear
from qvit.train.oscillation import MOMENTUM, OSCILLATING, Oscillation


def layer() -> nn.Module:
    """Return a model of one 4-bit layer with scale 1, whose codes are its rounded weights."""
    linear = QuantLinear(nn.Linear(3, 2, bias=False), Bits(4, 4))
    linear.weight_quantizer.set(torch.ones(2))
    return nn.Sequential(linear)


def walk(model: nn.Module, steps: list[list[float]], freeze_above: float = 0.0) -> Oscillation:
    """Set the first three weights to each of ``steps`` in turn."""
    weight = model[0].weight  # type: ignore[index, union-attr]
    with torch.no_grad():
        weight[0] = torch.tensor(steps[0])
        oscillation = Oscillation(model, freeze_above)
        for values in steps[1:]:
            weight[0] = torch.where(frozen(oscillation), weight[0], torch.tensor(values))
            oscillation.update()
    return oscillation


def frozen(oscillation: Oscillation) -> torch.Tensor:
    return oscillation.state["0"].get("frozen", torch.zeros(2, 3, dtype=torch.bool))[0]


def test_frequency_is_that_of_changes_that_turn_back() -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(-3, 4, (60, 3)).astype(float)
    oscillation = walk(layer(), steps.tolist())
    # Written out weight by weight: a step counts if the code changes against the direction of its last change.
    for weight in range(3):
        frequency, last = 0.0, 0.0
        for before, now in zip(steps[:-1, weight], steps[1:, weight], strict=True):
            change = np.sign(now - before)
            frequency = (1 - MOMENTUM) * frequency + MOMENTUM * (change * last < 0)
            last = change or last
        assert float(oscillation.state["0"]["frequency"][0, weight]) == pytest.approx(frequency, rel=1e-5)


def test_shares_count_weights_above_the_threshold() -> None:
    # The first weight turns back at every step, the second only climbs, the third moves within its code.
    oscillation = walk(layer(), [[n % 2, n // 10, 0.2 * (n % 2)] for n in range(40)])
    assert oscillation.percentages() == {"oscillating": pytest.approx(100 / 6)}
    assert OSCILLATING < float(oscillation.state["0"]["frequency"][0, 0]) < 1


def test_frozen_weight_keeps_its_average_code_and_follows_its_scale() -> None:
    model = layer()
    # Two steps of three at code 2, one at code 1.
    oscillation = walk(model, [[2.0 - (n % 3 == 2), 0.0, 0.0] for n in range(40)], freeze_above=0.1)
    assert frozen(oscillation).tolist() == [True, False, False]
    assert oscillation.percentages()["frozen"] == pytest.approx(100 / 6)
    with torch.no_grad():
        model[0].weight += 0.9  # type: ignore[index, union-attr, operator]
        model[0].weight_quantizer.set(torch.tensor([0.5, 0.5]))  # type: ignore[index, union-attr, operator]
    oscillation.update()
    assert model[0].weight[0].tolist() == pytest.approx([2 * 0.5, 0.9, 0.9])  # type: ignore[index, union-attr]


def test_state_goes_on_where_it_was() -> None:
    steps = [[n % 2, n % 3, n % 5] for n in range(31)]
    whole = walk(layer(), steps, freeze_above=0.2)
    model = layer()
    first = walk(model, steps[:16], freeze_above=0.2)
    second = Oscillation(model, 0.2)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for values in steps[16:]:
            weight = model[0].weight  # type: ignore[index, union-attr]
            weight[0] = torch.where(frozen(second), weight[0], torch.tensor(values, dtype=torch.float32))  # type: ignore
            second.update()
    assert all(torch.equal(value, second.state["0"][key]) for key, value in whole.state["0"].items())
