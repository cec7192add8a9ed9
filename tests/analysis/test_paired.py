"""Counts, errors and the test of two models on the same images, beside what they are by definition."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qvit.analysis.paired import KEPT, Paired, Right, compare_classes
from qvit.data.datasets import Unreadable
from qvit.data.loader import Batch
from qvit.errors import CorruptImageError


class Says(nn.Module):
    """Takes the value of one pixel of an image for its class."""

    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel = pixel

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, self.pixel].long(), 10).float()


def compared(images: np.ndarray, labels: np.ndarray, *, labelled: bool = True, size: int = 7) -> Paired:
    """Compare two models on images whose pixels are what they say."""

    def batches() -> Iterator[tuple[Batch, Batch]]:
        for at in range(0, len(labels), size):
            chosen = slice(at, at + size)
            pixels = torch.from_numpy(images[chosen]).float()[:, None, None]
            batch = Batch(pixels, torch.from_numpy(labels[chosen]), [], list(range(at, at + len(pixels))))
            yield batch, batch

    return compare_classes(Says(0), Says(1), batches(), torch.device("cpu"), labelled=labelled)


def samples(count: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, classes, (count, 2)), rng.integers(0, classes, count)


@pytest.mark.parametrize("count", [1, 60])
def test_counts_are_those_of_the_definition(count: int) -> None:
    images, labels = samples(count)
    found = compared(images, labels)
    first, second = (images[:, n] == labels for n in range(2))
    assert found.right == (
        (first & second).sum(),
        (first & ~second).sum(),
        (~first & second).sum(),
        (~first & ~second).sum(),
    )
    assert (found.images, found.same) == (count, (images[:, 0] == images[:, 1]).sum())
    for estimate, values in zip((*found.top1, found.gain), (first, second, second * 1.0 - first), strict=True):
        assert estimate.percent == pytest.approx(100 * values.mean())
    for kind, expected in enumerate((first & ~second, ~first & second, ~first & ~second)):
        for difference in found.differences[kind]:
            assert expected[difference.image]
            assert difference.classes == tuple(images[difference.image])
            assert difference.classes[0] != difference.classes[1]
            assert difference.label == labels[difference.image]


def test_one_image_proves_nothing() -> None:
    found = Paired(1, 0, 1, Right(1, 0, 0, 0), [])
    assert str(found.agreement) == "100.00 (20.65 to 100.00)"
    assert list(map(str, found.top1)) == ["100.00 (20.65 to 100.00)"] * 2
    assert str(found.gain) == "0.00 (-92.39 to 92.39)"
    assert str(Paired(10, 0, 0, None, []).agreement) == "0.00 (0.00 to 27.75)"


@given(both=st.integers(0, 300), first=st.integers(0, 300), second=st.integers(0, 300), neither=st.integers(1, 300))
def test_intervals_hold_their_estimate_and_are_never_empty(both: int, first: int, second: int, neither: int) -> None:
    found = Paired(both + first + second + neither, 0, 0, Right(both, first, second, neither), [])
    for estimate, least in ((found.gain, -100.0), *((top1, 0.0) for top1 in found.top1)):
        assert least <= estimate.low <= estimate.percent + 1e-9
        assert estimate.percent - 1e-9 <= estimate.high <= 100
        assert estimate.low < estimate.high


@pytest.mark.parametrize("chances", [(0.1, 0.2), (0.02, 0.02), (0.3, 0.05)])
def test_interval_of_a_gain_holds_the_truth_in_95_of_100_cases(chances: tuple[float, float]) -> None:
    counts = np.random.default_rng(0).multinomial(80, [*chances, 1 - sum(chances)], 1000).tolist()
    gains = [Paired(80, 0, 0, Right(0, *rest), []).gain for rest in counts]
    held = [gain.low <= 100 * (chances[1] - chances[0]) <= gain.high for gain in gains]
    assert 0.93 < np.mean(held) <= 1


@given(first=st.integers(0, 40), second=st.integers(0, 40))
def test_p_value_is_that_of_the_binomial_distribution(first: int, second: int) -> None:
    alone = first + second
    tail = sum(math.comb(alone, k) for k in range(min(first, second) + 1)) / 2**alone
    found = Paired(100, 0, 50, Right(10, first, second, 5), []).p_value
    assert found == pytest.approx(min(1.0, 2 * tail))


def test_without_labels_there_is_agreement_alone() -> None:
    images, labels = samples(60)
    found = compared(images, labels, labelled=False)
    assert (found.right, found.top1, found.gain, found.p_value) == (None, None, None, None)
    (kind,) = found.differences
    assert len(kind) == KEPT
    assert all(difference.label is None for difference in kind)


def test_many_images_take_no_more_memory_than_few() -> None:
    peaks = []
    for count in (500, 500, 10_000):  # the first one for what is made once
        images, labels = samples(count)
        tracemalloc.start()
        found = compared(images, labels, size=250)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [len(kind) for kind in found.differences] == [KEPT] * 3
    assert peaks[2] < 1.5 * peaks[1]
    spread = [difference.image for difference in found.differences[0]]
    assert max(spread) > 5_000  # some of all, and not the first ones


def test_nothing_to_compare_is_an_error() -> None:
    batch = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [Unreadable("x.png cannot be read.")], [])
    with pytest.raises(CorruptImageError, match="nothing to compare"):
        compare_classes(Says(0), Says(1), [(batch, batch)], torch.device("cpu"), labelled=True)
