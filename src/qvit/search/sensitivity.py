"""How far the outputs move from the float model's when one quantizer alone has few bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvit.models.families import classifies, family_of
from qvit.nn.modes import evaluating
from qvit.nn.quantizer import Quantizer
from qvit.quantization.calibrate import Scale
from qvit.quantization.outputs import output_distance

Distances = dict[str, dict[int, float]]
"""Distance of the outputs (:func:`qvit.quantization.outputs.output_distance`) by quantizer and bits."""


class Rescaled:
    """A student whose quantizers take other bits, with the scales that were fitted for each.

    Args:
        student: what :func:`qvit.quantize` returned.
        scales: what :func:`qvit.quantization.calibrate.scales_by_bits` returned of it.
    """

    def __init__(self, student: nn.Module, scales: Mapping[str, Mapping[int, Scale]]) -> None:
        self.student, self.scales = student, scales
        self.quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}

    def set(self, bits: Mapping[str, int]) -> None:
        """Give quantizers bits, by name; those that have none compute with float values."""
        for name, quantizer in self.quantizers.items():
            quantizer.enabled = name in bits
            if name in bits:
                quantizer.change(bits[name], *self.scales[name][bits[name]])

    def distance(self, batches: Iterable[Tensor], wanted: Tensor) -> float:
        """Return the distance of the outputs for all images from those that are wanted."""
        return float(output_distance(outputs_of(self.student, batches), wanted, classes=classifies(self.student)))


def sensitivities(
    model: Rescaled,
    batches: Sequence[Tensor],
    names: Sequence[str],
    widths: Sequence[int],
    report: Callable[[int, int], None],
) -> Distances:
    """Return the distance of the outputs for each quantizer called by ``names`` at each of some widths, all else float.

    A wider quantizer is never taken for worse than a narrower one: what says so is too small to be measured.

    Args:
        model: the student; its quantizers are changed.
        batches: images ``(B, C, H, W)`` on the student's device.
        names: of quantizers.
        widths: numbers of bits, ascending.
        report: called with how many of how many measurements are done.
    """
    distances: Distances = {}
    model.set({})
    wanted = outputs_of(model.student, batches)
    for start, owned in _by_block(model.student, names).items():
        model.set({})
        with _resumed(model.student, batches, start):
            for name in owned:
                distances[name] = {}
                for bits in widths:
                    model.set({name: bits})
                    measured = model.distance(batches, wanted)
                    distances[name][bits] = min([measured, *distances[name].values()])
                    report(sum(map(len, distances.values())), len(names) * len(widths))
    return distances


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return the outputs for all images, in evaluation."""
    with evaluating(model):
        return torch.cat([model(batch) for batch in batches])


def _by_block(student: nn.Module, names: Sequence[str]) -> dict[int, list[str]]:
    """Return names of modules by the number of the block that they are in; 0 also for those that are in none."""
    called = {module: name for name, module in student.named_modules()}
    prefixes = [f"{called[block]}." for block in family_of(student).blocks(student)]
    owned: dict[int, list[str]] = {}
    for name in names:
        owned.setdefault(next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), 0), []).append(name)
    return owned


@contextmanager
def _resumed(student: nn.Module, batches: Sequence[Tensor], start: int) -> Iterator[None]:
    """Let a student begin with its block number ``start``, on what comes there now; for ``batches`` in their order.

    Half of all blocks need not run then, on average over the blocks that something is changed in.
    """
    before: list[Any] = family_of(student).blocks(student)[:start]
    if not before:
        yield
        return
    kept: list[Tensor] = []
    handle = before[-1].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        outputs_of(student, batches)
    finally:
        handle.remove()
    again = itertools.cycle(kept)
    for block in before[:-1]:
        block.forward = lambda x, *args, **kwargs: x
    before[-1].forward = lambda *args, **kwargs: next(again)
    try:
        yield
    finally:
        for block in before:
            del block.forward
