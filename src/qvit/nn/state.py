"""Whether saved state, from a file that may be edited, is like the state in whose place it is to be put."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qvit.files import shown

_LARGEST = 2**1000
"""Whole numbers above have no floating point value."""


def why_not_like(saved: Any, expected: Tensor) -> str | None:
    """Return why ``saved`` cannot stand for ``expected``, in words that follow its name, or ``None``.

    It must be a dense tensor of finite values, of the same shape and dtype.
    """
    if type(saved) is not Tensor or saved.is_sparse or saved.is_quantized or saved.is_meta:
        return f"must be a dense tensor, not {shown(saved)}"
    if saved.shape != expected.shape:
        return f"has shape {tuple(saved.shape)}, this run needs {tuple(expected.shape)}"
    if saved.dtype != expected.dtype:
        return f"is of type {saved.dtype}, this run needs {expected.dtype}".replace("torch.", "")
    if not bool(torch.isfinite(saved).all()):
        return "holds a NaN or an infinity"
    return None


def is_finite(value: Any) -> bool:
    """Return whether ``value`` is a finite number, and no truth value."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, float) and math.isfinite(value)
