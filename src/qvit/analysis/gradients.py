"""How both terms of the loss (docs/method.md, section 3) pull at queries and keys: size and direction of gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import DataError
from qvit.models.queries import attention_layers
from qvit.quantization.distill import DistillationLoss


@dataclass(frozen=True)
class LossGradients:
    """Gradients with respect to the query and key weights of one attention layer, means over batches.

    Attributes:
        layer: index of the layer, from 0.
        labels: norm of the gradient of ``L_dist``.
        guided: norm of the gradient of ``lambda L_DGD``.
        cosine: of the angle between them: 1 where both want the same, 0 where they have nothing to do with one another.
    """

    layer: int
    labels: float
    guided: float
    cosine: float


def loss_gradients(
    student: nn.Module, loss_fn: DistillationLoss, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[LossGradients]:
    """Return the gradients of both terms for every attention layer of ``student``, which is left as it is.

    Args:
        student: quantized and calibrated, of as many layers and heads as the teacher.
        loss_fn: guided; its lambda is that of the result.
        batches: images ``(B, C, H, W)`` and labels ``(B,)``, on the student's device.

    Raises:
        DataError: if there is no batch.
        TeacherMismatchError: see :class:`DistillationLoss`.
    """
    model = copy.deepcopy(student).train()  # in training the rectifiers' running averages move
    weights = [_weights(layer) for layer in attention_layers(model)]
    weight = loss_fn.guided_weight
    labels, guided, cosine = (torch.zeros(len(weights), dtype=torch.float64) for _ in range(3))
    count = 0
    try:
        for images, classes in batches:
            full, unguided = (_gradients(model, loss_fn, images, classes, weights, w) for w in (weight, 0.0))
            for layer, (total, alone) in enumerate(zip(full, unguided, strict=True)):
                pull = total - alone
                labels[layer] += alone.norm().item()
                guided[layer] += pull.norm().item()
                cosine[layer] += torch.cosine_similarity(alone, pull, dim=0).item()
            count += 1
    finally:
        loss_fn.guided_weight = weight
    if not count:
        raise DataError("The gradients need at least one batch, and there was none.")
    means = torch.stack([labels, guided, cosine], dim=1) / count
    return [LossGradients(layer, *values) for layer, values in enumerate(means.tolist())]


def _weights(layer: Any) -> list[Tensor]:
    """Return the weights that make queries and keys: of one projection, whose last third makes values, or of two."""
    return [layer.qkv.weight] if layer.qkv is not None else [layer.q_proj.weight, layer.k_proj.weight]


def _gradients(
    model: nn.Module,
    loss_fn: DistillationLoss,
    images: Tensor,
    classes: Tensor,
    weights: list[list[Tensor]],
    weight: float,
) -> list[Tensor]:
    loss_fn.guided_weight = weight
    grads = iter(torch.autograd.grad(loss_fn(model, images, classes), [part for parts in weights for part in parts]))
    found = [[next(grads) for _ in parts] for parts in weights]
    joined = [parts[0][: 2 * len(parts[0]) // 3] if len(parts) == 1 else torch.cat(parts) for parts in found]
    return [grad.double().flatten() for grad in joined]
