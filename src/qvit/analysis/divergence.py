"""How far distributions of queries and keys are from those of another model (docs/method.md, section 6)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qvit.analysis.statistics import QueryKeyStatistics
from qvit.errors import DataError


def divergence(reference: QueryKeyStatistics, other: QueryKeyStatistics) -> tuple[float, float]:
    """Return the Kullback-Leibler divergences of queries and of keys, in bits: ``sum p log2(p / q)``.

    ``p`` are the relative frequencies of the reference and ``q`` those of the other, over the same bins and one more
    for all values outside of them. Half a value is added to every bin of both, so that one that is empty in the other
    does not make the sum infinite.

    Raises:
        DataError: if the bins differ.
    """
    for first, second in ((reference.edges, other.edges), (reference.key_edges, other.key_edges)):
        if not np.array_equal(first, second):
            raise DataError("Histograms with different bins cannot be compared: count both over the bins of one.")
    return (
        _divergence(reference.counts, reference.values, other.counts, other.values),
        _divergence(reference.key_counts, reference.values, other.key_counts, other.values),
    )


def _divergence(counts: NDArray[np.int64], values: int, other_counts: NDArray[np.int64], other_values: int) -> float:
    p, q = (
        np.append(inside, total - inside.sum()) + 0.5
        for inside, total in ((counts, values), (other_counts, other_values))
    )
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log2(p / q)).sum())
