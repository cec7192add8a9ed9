"""The distance of guided distillation as the paper writes it."""

from __future__ import annotations

import torch
from torch import Tensor


def by_definition(teacher: Tensor, student: Tensor) -> Tensor:
    """|| G_T - G ||_F with both N x N matrices built, in float64."""

    def gram(x: Tensor) -> Tensor:
        product = torch.einsum("bhnd,bhmd->bhnm", x.double(), x.double())
        return product / product.square().sum(dim=(-2, -1), keepdim=True).sqrt()

    return (gram(teacher) - gram(student)).square().sum(dim=(-2, -1)).sqrt()
