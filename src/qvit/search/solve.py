"""The exact choice of one candidate for every item, with the least sum of values inside of all limits.

This is a multiple-choice knapsack; HiGHS solves it as a mixed-integer linear program, through SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Numbers = Sequence[Sequence[float]]
"""A number for every candidate of every item."""
_TOLERANCE = 1e-9
"""Of a limit: what is beyond it by no more is within, as a sum in another order may be."""
_NEARLY = 1e-6
"""HiGHS takes a number for a whole one, and a limit for kept, if no more than this is amiss."""
_RANGE = 1e4
"""What the sum of all values is scaled to: HiGHS takes sums that differ by less than 1e-6 for equal."""


class UnmetError(Exception):
    """A limit that no choice keeps, together with those before it.

    Attributes:
        limit: its name.
        least: the smallest sum that a choice has within the limits before it.
    """

    def __init__(self, limit: str, least: float) -> None:
        super().__init__(limit, least)
        self.limit, self.least = limit, least


def choose(values: Numbers, costs: Mapping[str, Numbers], limits: Mapping[str, float]) -> list[int]:
    """Return the candidate of every item such that the values' sum is the least within all limits.

    Among candidates of one value and cost the first is taken. Of costs that are no whole numbers a choice within a
    limit by less than some millionths of it may be passed over where others are beyond it by as little.

    Args:
        values: what is to be small.
        costs: for each limit, by its name, what the candidates take of it.
        limits: the largest sums of costs, by name; in the order in which they are told of if they cannot be kept.

    Raises:
        UnmetError: for the first limit that cannot be kept.
    """
    kept: dict[str, float] = {}
    chosen: list[int] = []
    for name, limit in limits.items():
        chosen = _least(costs[name], costs, kept, chosen)
        least, most = total(costs[name], chosen), limit + _TOLERANCE * abs(limit)
        if least > most:
            raise UnmetError(name, least)
        kept[name] = most
    return _least(values, costs, kept, chosen)


def total(numbers: Numbers, chosen: Sequence[int]) -> float:
    """Return the sum over the candidates that are chosen."""
    return sum(item[index] for item, index in zip(numbers, chosen, strict=True))


def _least(values: Numbers, costs: Mapping[str, Numbers], limits: Mapping[str, float], within: list[int]) -> list[int]:
    """Return the choice of the least sum; ``within`` is one within the limits."""
    if not limits:
        return [item.index(min(item)) for item in map(list, values)]
    # Of each item what could be chosen: what fits beside the least of all others, and is not worse in everything.
    slack = {name: limit - sum(map(min, costs[name])) for name, limit in limits.items()}
    candidates: list[list[int]] = []
    for number, item in enumerate(values):
        rows = [(costs[name][number], min(costs[name][number]) + room) for name, room in slack.items()]
        fitting = [i for i in range(len(item)) if all(cost[i] <= most for cost, most in rows)]
        candidates.append(_undominated({i: (item[i], *(cost[i] for cost, _ in rows)) for i in fitting}))
    owner = np.repeat(np.arange(len(values)), [len(indices) for indices in candidates])
    of_item = (owner == np.arange(len(values))[:, None]).astype(float)
    told = {name: _row(*_beyond_the_least(costs[name], candidates), limit) for name, limit in limits.items()}
    objective, _ = _beyond_the_least(values, candidates)
    broken: list[str] = []
    while True:
        result = milp(
            objective * (_RANGE / (float(objective.sum()) or 1.0)),
            constraints=[
                LinearConstraint(of_item, 1, 1),
                *(LinearConstraint(cost, -np.inf, room) for cost, room in told.values()),
            ],
            bounds=Bounds(0, 1),
            integrality=np.ones(len(owner)),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:  # a limit was lowered, below what any choice takes
            assert broken, result.message
            return within
        places = [int(np.argmax(np.where(owner == number, result.x, -1))) for number in range(len(values))]
        flat = [index for indices in candidates for index in indices]
        chosen = [flat[place] for place in places]
        broken = [name for name, limit in limits.items() if total(costs[name], chosen) > limit]
        if not broken:
            return chosen
        # HiGHS kept the limit in nearly whole numbers, and so it may with any number of choices of about this cost. All
        # of them are beyond a limit that is lowered by the most that this can make, a few millionths.
        for name in broken:
            cost, room = told[name]
            told[name] = cost, room - 2 * _NEARLY * (1 + float((of_item * cost).max(axis=1).sum()))


def _row(cost: NDArray[np.float64], base: float, limit: float) -> tuple[NDArray[np.float64], float]:
    """Return costs and what is left for them of a limit, as the solver is told them.

    Whole numbers are told in their greatest common divisor: choices of like layers, of which there are many, then
    either keep the limit or are half of one beyond it, which the solver tells from each other.
    """
    room = max(limit - base, 0.0)
    if (cost == np.rint(cost)).all() and 0 < cost.max() < 2**53:
        unit = float(np.gcd.reduce(cost.astype(np.int64)))
        return cost / unit, math.floor(room / unit) + 0.5
    unit = float(cost.max()) or 1.0
    return cost / unit, room / unit


def _undominated(points: Mapping[int, tuple[float, ...]]) -> list[int]:
    """Return the points than which no other one is better in something and worse in nothing; of equals the first."""
    return [
        index
        for index, point in points.items()
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and (other != point or place < index)
            for place, other in points.items()
            if place != index
        )
    ]


def _beyond_the_least(numbers: Numbers, candidates: Sequence[Sequence[int]]) -> tuple[NDArray[np.float64], float]:
    """Return every candidate's number beyond the least of its item, one after the other, and the sum of the least."""
    least = [min(item[index] for index in indices) for item, indices in zip(numbers, candidates, strict=True)]
    beyond = [
        item[index] - low for item, indices, low in zip(numbers, candidates, least, strict=True) for index in indices
    ]
    return np.array(beyond, dtype=np.float64), sum(least)
