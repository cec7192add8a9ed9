"""The solver against all choices there are."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint

from qvit.search import solve
from qvit.search.solve import UnmetError, choose, total

SMALL = st.integers(0, 9)
ROUNDING = 1e-15
"""Of a sum."""
BARELY = 2e-9
"""More than what a limit is kept to, and less than what the solver keeps one to."""


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], dict[str, list[list[float]]], dict[str, float]]:
    """Items of one to four candidates, of whole numbers or of fractions that are no sums of one another's halves."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    number = draw(st.sampled_from([SMALL, SMALL.map(lambda n: n / 7), SMALL.map(lambda n: n * 1e6 + 1)]))
    rows = [[draw(st.lists(number, min_size=n, max_size=n)) for n in sizes] for _ in range(draw(st.integers(1, 4)))]
    names = [f"cost {index}" for index in range(len(rows) - 1)]
    costs = dict(zip(names, rows[1:], strict=True))
    limits = {}
    for name in names:  # of some choice: at the very edge, or below it, by what a sum in another order may be or more
        edge = total(costs[name], [draw(st.integers(0, n - 1)) for n in sizes])
        limits[name] = draw(st.sampled_from([edge, edge * (1 - ROUNDING), edge * (1 - BARELY), edge - 1]))
    return rows[0], costs, limits


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_choice_is_the_best_of_all(
    problem: tuple[list[list[float]], dict[str, list[list[float]]], dict[str, float]],
) -> None:
    values, costs, limits = problem
    every = list(itertools.product(*(range(len(item)) for item in values)))

    def within(names: list[str]) -> list[tuple[int, ...]]:
        return [
            c for c in every if all(total(costs[name], c) <= limits[name] + 1e-9 * abs(limits[name]) for name in names)
        ]

    names = list(limits)
    unmet = next((place for place in range(len(names)) if not within(names[: place + 1])), None)
    if unmet is not None:
        least = min(total(costs[names[unmet]], c) for c in within(names[:unmet]))
        with pytest.raises(UnmetError) as refused:
            choose(values, costs, limits)
        assert (refused.value.limit, refused.value.least) == (names[unmet], pytest.approx(least))
        return
    found = choose(values, costs, limits)
    assert tuple(found) in within(names)
    assert total(values, found) == pytest.approx(min(total(values, c) for c in within(names)), abs=1e-9)


def test_at_one_cost_the_better_is_taken_and_of_equals_the_first() -> None:
    values = [[3.0, 1.0, 1.0, 0.5], [1e-12, 0.0]]
    costs = {"ms": [[1.0, 1.0, 1.0, 2.0], [5.0, 5.0]]}
    assert choose(values, costs, {"ms": 6.0}) == [1, 1]
    assert choose(values, {}, {}) == [3, 1]


def test_a_limit_that_cannot_be_kept_tells_the_least_within_those_before_it() -> None:
    costs = {"a": [[1.0, 4.0]], "b": [[4.0, 1.0]]}
    for limits, told in (({"a": 0.5, "b": 4.0}, ("a", 1.0)), ({"a": 3.0, "b": 3.0}, ("b", 4.0))):
        with pytest.raises(UnmetError) as unmet:
            choose([[0.0, 0.0]], costs, limits)
        assert (unmet.value.limit, unmet.value.least) == told


def test_many_choices_that_rounding_put_beyond_a_limit_are_not_refused_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of one cost: each was refused by itself, after the solver had taken it for one within the limit."""
    rounds = Mock(wraps=solve.milp)
    monkeypatch.setattr(solve, "milp", rounds)
    costs = {"ms": [[size * bits * 1e-7 for bits in (2, 3, 4, 8)] for size in (1769472, 589824, 2359296, 2359296)] * 3}
    values = [[4.0**-bits for bits in (2, 3, 4, 8)]] * 12
    limit = total(costs["ms"], [2] * 6 + [1] * 6)
    found = choose(values, costs, {"ms": limit})
    assert choose(values, costs, {"ms": limit * (1 - ROUNDING)}) == found
    assert rounds.call_count == 2


@pytest.mark.parametrize("unit", [1, 1e-7])  # counted, and measured
@pytest.mark.parametrize("alike", [True, False])
def test_many_choices_barely_beyond_a_limit_are_not_refused_one_by_one(
    monkeypatch: pytest.MonkeyPatch, unit: float, alike: bool
) -> None:
    """The solver takes numbers for whole ones that are nearly so, and these choices for some within the limit."""
    rounds = Mock(wraps=solve.milp)
    monkeypatch.setattr(solve, "milp", rounds)
    costs = {"cost": [[size * bits * unit for bits in (2, 3, 4, 8)] for size in (1769472, 589824, 2359296)] * 8}
    weights = [1.0 if alike else 1 + number / 200 for number in range(24)]
    values = [[weight * 4.0**-bits for bits in (2, 3, 4, 8)] for weight in weights]
    limit = total(costs["cost"], [2] * 12 + [1] * 12)
    expected = choose(values, costs, {"cost": limit * (1 - 1e-4)})
    rounds.reset_mock()
    assert choose(values, costs, {"cost": limit * (1 - BARELY)}) == expected
    assert rounds.call_count <= 2


def test_what_the_solver_takes_for_kept_and_is_not_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def loosely(objective: Any, constraints: list[LinearConstraint], **options: Any) -> Any:
        limited = [LinearConstraint(c.A, c.lb, c.ub + 1e-4 * np.isinf(c.lb)) for c in constraints]
        return milp(objective, constraints=limited, **options)

    milp = solve.milp
    monkeypatch.setattr(solve, "milp", loosely)
    costs = {"ms": [[0.0, 0.5], [0.0, 0.50003]]}
    assert choose([[3.0, 0.0], [2.0, 0.0]], costs, {"ms": 1.0}) == [1, 0]
