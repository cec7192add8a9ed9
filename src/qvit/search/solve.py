"""The exact choice of one candidate for every item, with the least sum of values inside of all limits.

This is a multiple-choice knapsack; HiGHS solves it as a mixed-integer linear program, through SciPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Numbers = Sequence[Sequence[float]]
"""A number for every candidate of every item."""
_TOLERANCE = 1e-9
"""Of a limit: what is beyond it by no more is within, as a sum in another order may be."""
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

    Among candidates of one value and cost the first is taken.

    Args:
        values: what is to be small.
        costs: for each limit, by its name, what the candidates take of it.
        limits: the largest sums of costs, by name; in the order in which they are told of if they cannot be kept.

    Raises:
        UnmetError: for the first limit that cannot be kept.
    """
    kept: dict[str, float] = {}
    for name, limit in limits.items():
        least, most = total(costs[name], _least(costs[name], costs, kept)), limit + _TOLERANCE * abs(limit)
        if least > most:
            raise UnmetError(name, least)
        kept[name] = most
    return _least(values, costs, kept)


def total(numbers: Numbers, chosen: Sequence[int]) -> float:
    """Return the sum over the candidates that are chosen."""
    return sum(item[index] for item, index in zip(numbers, chosen, strict=True))


def _least(values: Numbers, costs: Mapping[str, Numbers], limits: Mapping[str, float]) -> list[int]:
    """Return the choice of the least sum; there has to be one within the limits."""
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
    constraints = [LinearConstraint((owner == np.arange(len(values))[:, None]).astype(float), 1, 1)]
    for name, limit in limits.items():
        cost, base = _beyond_the_least(costs[name], candidates)
        unit = float(cost.max()) or 1.0
        constraints.append(LinearConstraint(cost[None] / unit, -np.inf, max(limit - base, 0) / unit))
    objective, _ = _beyond_the_least(values, candidates)
    while True:
        result = milp(
            objective * (_RANGE / (float(objective.sum()) or 1.0)),
            constraints=constraints,
            bounds=Bounds(0, 1),
            integrality=np.ones(len(owner)),
            options={"mip_rel_gap": 0.0},
        )
        assert result.x is not None, result.message
        places = [int(np.argmax(np.where(owner == number, result.x, -1))) for number in range(len(values))]
        flat = [index for indices in candidates for index in indices]
        chosen = [flat[place] for place in places]
        if all(total(costs[name], chosen) <= limit for name, limit in limits.items()):
            return chosen
        # HiGHS keeps limits to a tolerance. This choice lies within it, and beyond a limit: any other one.
        same = np.isin(np.arange(len(owner)), places)[None].astype(float)
        constraints.append(LinearConstraint(same, 0, len(values) - 1))


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
