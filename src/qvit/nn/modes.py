"""Modes of a model: evaluation for a while, and everything as it was after that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put ``models`` in evaluation mode; after that every module of theirs is in the mode that it was found in."""
    found = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in found:
            module.training = training
