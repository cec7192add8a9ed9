"""Every product of every instruction set of this machine against int64 NumPy, bit for bit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qvit import _kernels

PRODUCTS = [
    (isa, name, left, right) for isa in _kernels.instruction_sets() for name, (left, right) in _kernels.products(isa)
]
EACH = pytest.mark.parametrize(("isa", "name", "left", "right"), PRODUCTS, ids=[f"{p[0]}-{p[1]}" for p in PRODUCTS])
PATTERNS = ("random", "all_max", "all_min", "alternating", "opposite")


def codes(pattern: str, low: int, high: int, shape: tuple[int, int], seed: int) -> NDArray[np.int64]:
    """Return codes from ``low`` to ``high``, random or at the ends of that range."""
    if pattern == "random":
        return np.random.default_rng(seed).integers(low, high + 1, shape)
    columns = np.arange(shape[1])
    ends = {"all_max": columns * 0, "all_min": columns * 0 + 1, "alternating": columns % 2, "opposite": columns % 2 ^ 1}
    return np.broadcast_to(np.where(ends[pattern] == 0, high, low), shape)


def check(isa: str, name: str, bits: tuple[int, int], patterns: tuple[str, str], mnk: tuple[int, int, int]) -> None:
    m, n, k = mnk
    a = codes(patterns[0], 0, 2 ** bits[0] - 1, (m, k), 1)
    w = codes(patterns[1], -(2 ** (bits[1] - 1)), 2 ** (bits[1] - 1) - 1, (n, k), 2)
    out = np.full((m, n), -1, np.int32)
    _kernels.Matrix(isa, name, w.astype(np.int8)).multiply(a.astype(np.uint8), out)
    np.testing.assert_array_equal(out, a @ w.T)


@EACH
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products_are_exact(isa: str, name: str, left: int, right: int, data: st.DataObject) -> None:
    bits = data.draw(st.tuples(st.integers(2, left), st.integers(2, right)), "bits")
    patterns = data.draw(st.tuples(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS)), "patterns")
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 700)), "shape")
    check(isa, name, bits, patterns, shape)


@EACH
def test_products_are_exact_at_the_extremes(isa: str, name: str, left: int, right: int) -> None:
    """The widest codes that a product takes, at the largest sums, past every length after which sums are widened."""
    for patterns in product(PATTERNS, PATTERNS):
        check(isa, name, (left, right), patterns, (7, 33, 4096))


@EACH
@pytest.mark.parametrize("k", [4095, 8191, 12000])
def test_products_are_exact_over_long_sums(isa: str, name: str, left: int, right: int, k: int) -> None:
    for patterns in (("random", "random"), ("all_max", "all_min"), ("all_max", "all_max")):
        check(isa, name, (left, right), patterns, (3, 17, k))


@EACH
def test_products_are_exact_at_every_width(isa: str, name: str, left: int, right: int) -> None:
    for bits in product(range(2, left + 1), range(2, right + 1)):
        check(isa, name, bits, ("random", "random"), (5, 20, 530))
        check(isa, name, bits, ("all_max", "all_min"), (5, 20, 530))


@pytest.mark.parametrize("isa", _kernels.instruction_sets())
def test_every_instruction_set_takes_eight_bits(isa: str) -> None:
    assert _kernels.products(isa)[-1][1] == (8, 8)


def test_portable_is_the_last() -> None:
    assert _kernels.instruction_sets()[-1] == "portable"


def test_unknown_names_are_refused() -> None:
    weights = np.zeros((1, 1), np.int8)
    with pytest.raises(ValueError, match="instruction set called sse9"):
        _kernels.Matrix("sse9", "dense", weights)
    with pytest.raises(ValueError, match="no such product"):
        _kernels.Matrix("portable", "lookup", weights)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("isa", _kernels.instruction_sets())
def test_the_product_that_is_told_takes_these_codes(isa: str, moving: bool) -> None:
    takes = dict(_kernels.products(isa))
    for left, right in product(range(2, 9), repeat=2):
        most_left, most_right = takes[_kernels.product(isa, left, right, moving=moving)]
        assert left <= most_left
        assert right <= most_right
