"""Outlier channels: what norms give is brought to one size, for the layers behind them (docs/method.md, section 10).

One scale for all input channels of a layer is made by the largest of them; if that one is a thousand times as large as
the rest, the rest becomes zero. The norm before the layer can give the channel smaller, and the layer's weights take it
larger: the same float function. Factors are powers of two, so that not one bit of it changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qvit.format.branches import Attention, AttentionPool, Residual
from qvit.format.ops import Classify, Merge, Norm, Pool
from qvit.format.program import Program
from qvit.models.families import MODELS, image_size_of, lower
from qvit.nn.modes import switched_off
from qvit.nn.moments import Moments
from qvit.nn.rectifier import Rectifier

OUTLIER = 8
"""How many times the median of all channels the deviation of an outlier is, or its distance from their mean."""
IMAGES = 64
"""On which the channels are measured."""
Undo = list[tuple[Tensor, Tensor]]
"""Parameters that were changed, and their values before."""


class Fed(NamedTuple):
    """A norm and all layers that its output goes to, and nowhere else."""

    norm: nn.Module
    layers: list[nn.Module]


@torch.no_grad()
def balance(model: nn.Module, images: Sequence[Tensor], undo: Undo) -> None:
    """Bring outlier channels of norms to the size of the others, in place, by an equal change of the layers behind.

    Args:
        model: what :func:`qvit.quantize` returned, its quantizers switched off, in evaluation mode.
        images: batches ``(B, C, H, W)``; the first :data:`IMAGES` of them are looked at.
        undo: takes what was changed.
    """
    students = [student for student in model.modules() if type(student) in MODELS]
    feeds = [feed for student in students for feed in fed_layers(student)]
    # What another place takes too, a module or a parameter, would change there.
    owners = Counter(id(module) for feed in feeds for module in (feed.norm, *feed.layers))
    owners.update(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    feeds = [
        feed
        for feed in feeds
        if all(
            owners[id(member)] == 1 for module in (feed.norm, *feed.layers) for member in (module, *module.parameters())
        )
    ]
    seen = [Moments() for _ in feeds]
    with switched_off(m for m in model.modules() if isinstance(m, Rectifier)), ExitStack() as hooks:
        for feed, moments in zip(feeds, seen, strict=True):
            hook = feed.norm.register_forward_hook(lambda norm, args, x, moments=moments: moments.add(x))
            hooks.callback(hook.remove)
        left = IMAGES
        for batch in images:
            model(batch[:left])
            left -= len(batch)
            if left <= 0:
                break
    for feed, moments in zip(feeds, seen, strict=True):
        _balance(feed, moments, undo)


def fed_layers(student: nn.Module) -> Iterator[Fed]:
    """Yield the norms of a quantized model whose output is the input of layers alone, and these layers.

    Norms without a weight, and norms that end a branch, are none.
    """
    program, lowering = lower(student, image_size_of(student))
    names: dict[str, list[str]] = {}
    for norm, layer in _pairs(program):
        names.setdefault(norm, []).append(layer)
    for norm, layers in names.items():
        module = lowering.module(norm)
        if getattr(module, "weight", None) is not None:
            yield Fed(module, [lowering.module(part) for layer in layers for part in lowering.parts[layer]])


def _pairs(program: Program) -> Iterator[tuple[str, str]]:
    """Yield the names of norms and of layers that they feed."""
    pooled: Norm | None = None
    for operation in program.operations:
        if isinstance(operation, Residual):
            for branch in operation.branches:
                first = [branch.qkv] if isinstance(branch, Attention) else [branch.gate, branch.fc1]
                last = branch.proj if isinstance(branch, Attention) else branch.fc2
                if branch.norm is not None and not operation.post:
                    yield from ((branch.norm.name, layer.name) for layer in first if layer is not None)
                if branch.inner_norm is not None:
                    yield branch.inner_norm.name, last.name
        elif isinstance(operation, Merge) and operation.norm is not None:
            yield operation.norm.name, operation.layer.name
        elif isinstance(operation, Classify) and pooled is not None:
            yield from ((pooled.name, layer.name) for layer in operation.heads)
        elif isinstance(operation, AttentionPool) and pooled is not None:
            yield pooled.name, operation.kv.name
        # Pooling takes a channel as it is, small or large.
        pooled = operation if isinstance(operation, Norm) else pooled if isinstance(operation, Pool) else None


def _balance(feed: Fed, moments: Moments, undo: Undo) -> None:
    norm: Any = feed.norm
    mean, deviation = (values.to(norm.weight.device) for values in (moments.mean, moments.variance.sqrt()))
    usual = deviation.median()
    if not usual > 0:
        return
    ratio = deviation / usual
    factor = torch.where(ratio >= OUTLIER, torch.exp2(ratio.log2().round()), 1.0)
    middle = (mean / factor).median()
    away = mean / factor - middle
    shift = torch.where(away.abs() >= OUTLIER * usual, away, 0.0)
    biases = [norm.bias if hasattr(norm, "bias") else None, *(layer.bias for layer in feed.layers)]
    if any(bias is None for bias in biases):
        shift = torch.zeros_like(shift)
    if bool((factor == 1).all()) and not bool(shift.any()):
        return
    changed = [norm.weight, *biases, *(layer.weight for layer in feed.layers)]
    undo += [(parameter, parameter.clone()) for parameter in changed if parameter is not None]
    norm.weight.div_(factor)
    if biases[0] is not None:
        norm.bias.copy_(norm.bias.double() / factor - shift)
    for layer in feed.layers:
        assert isinstance(layer.weight, Tensor)
        layer.weight.mul_(factor)
        if isinstance(layer.bias, Tensor):
            layer.bias.copy_(layer.bias.double() + layer.weight.double() @ shift)
