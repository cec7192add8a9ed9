"""Moments of a stream of values."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and variance, channel by channel, of values ``(..., C)`` that come batch by batch; float64, on the CPU."""

    def __init__(self) -> None:
        self.count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in a batch."""
        rows = values.cpu().double().flatten(0, -2)
        self.count += len(rows)
        self._sum, self._squares = self._sum + rows.sum(dim=0), self._squares + rows.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """``(C,)``."""
        return self._sum / self.count

    @property
    def variance(self) -> Tensor:
        """``(C,)``, biased."""
        return (self._squares / self.count - self.mean.square()).clamp(min=0)
