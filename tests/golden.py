"""Golden files: one small packed file per family with the logits of its images, written once. No PyTorch here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qvit.format.program import Program

GOLDEN = Path(__file__).parent / "format" / "golden"
CLOSE = 1e-5
"""Of the largest value. Products of codes are exact and codes are chosen in float32, but exp, tanh and sums of floats
differ in their last places between versions of NumPy and between instruction sets."""


def images_of(program: Program) -> np.ndarray:
    """Return three images from -1 to 1 that need no random generator, whose stream NumPy may change."""
    count = 3 * int(np.prod(program.input))
    values = np.arange(count, dtype=np.int64) * 7919 % 2003
    return (values / 1001 - 1).astype(np.float32).reshape(3, *program.input)


def check_logits(family: str, got: np.ndarray) -> None:
    """Check that the logits of :func:`images_of` are those that were written down."""
    expected = np.load(GOLDEN / f"{family}.npy")
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(got, expected, rtol=0, atol=CLOSE * np.abs(expected).max())
