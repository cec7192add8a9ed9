"""Which part of a model its few bits cost most: the paper's bottleneck study (docs/method.md, section 6)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvit.config import MAX_BITS
from qvit.errors import DataError
from qvit.models.families import classifies, family_of
from qvit.nn.attention import QuantAttention
from qvit.nn.modes import evaluating, switched_off
from qvit.nn.quantizer import Quantizer
from qvit.quantization.outputs import output_distance

_OTHER = "other attention activations"
KINDS = ("MLP weights", "MLP activations", "attention weights", "queries and keys", _OTHER)
"""The kinds of quantizers inside a block; the last are inputs of the attention's linear layers, values and maps."""
OUTSIDE = "outside the blocks"
"""Patch embedding, merging, pooling and heads."""
EVERYTHING = "everything"
PARTS: dict[str, tuple[str, ...]] = {
    "MLPs": ("MLP weights", "MLP activations"),
    "MLP weights": ("MLP weights",),
    "MLP activations": ("MLP activations",),
    "attention weights": ("attention weights",),
    "attention activations": ("queries and keys", _OTHER),
    "queries and keys": ("queries and keys",),
    OUTSIDE: (OUTSIDE,),
    EVERYTHING: (*KINDS, OUTSIDE),
}
"""The parts that have few bits alone, and the kinds of quantizers that each is made of."""
_QUERIES_AND_KEYS = ("query_quantizer", "key_quantizer")


class Places:
    """The quantizers of a student by the block that they are in and by their kind.

    Args:
        student: what :func:`qvit.quantize` returned.
    """

    def __init__(self, student: nn.Module) -> None:
        names = {module: name for name, module in student.named_modules()}
        self.blocks = [names[block] for block in family_of(student).blocks(student)]
        attentions = [f"{name}." for module, name in names.items() if isinstance(module, QuantAttention)]
        self.kinds = {
            name: _kind(name, [f"{block}." for block in self.blocks], attentions)
            for name, module in student.named_modules(remove_duplicate=False)  # projections may share one
            if isinstance(module, Quantizer)
        }

    def of_part(self, part: str) -> list[str]:
        """Return the names of the quantizers of one of :data:`PARTS`."""
        return [name for name, kind in self.kinds.items() if kind in PARTS[part]]

    def of_block(self, block: str, kind: str) -> list[str]:
        """Return the names of the quantizers of one kind in one block."""
        return [name for name in self.kinds if name.startswith(f"{block}.") and self.kinds[name] == kind]


def overrides_of(names: Sequence[str], bits: int) -> dict[str, tuple[int, int]]:
    """Return overrides (:class:`qvit.QuantConfig`) with which the quantizers called ``names`` alone have few bits.

    Args:
        names: of quantizers.
        bits: that these have; all others have 8.
    """
    overrides: dict[str, tuple[int, int]] = {}
    for name in names:
        layer, _, part = name.rpartition(".")
        weight, activation = overrides.get(layer, (MAX_BITS, MAX_BITS))
        if part == "weight_quantizer":
            overrides[layer] = bits, activation
        elif part == "input_quantizer":
            overrides[layer] = weight, bits
        else:
            overrides[name] = bits, bits
    return overrides


@contextlib.contextmanager
def only(student: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let the quantizers called ``names`` quantize while the block runs ``student``, and no others."""
    chosen = set(names)
    others = [
        module for name, module in student.named_modules() if isinstance(module, Quantizer) and name not in chosen
    ]
    with switched_off(others):
        yield


class Tried:
    """Adds up what variants of a student give on some images.

    Args:
        teacher: the float model.
        student: made of it, calibrated.
        variants: for each by its name, the quantizers that quantize in it; all others pass on floats.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, variants: Mapping[str, Sequence[str]]) -> None:
        self.teacher, self.student, self.variants = teacher, student, variants
        self.classifies = classifies(teacher)
        self.images = self.labelled = 0
        self._float_right = 0
        self._sums = {name: {"same_class": 0.0, "top1": 0.0, "distance": 0.0} for name in variants}

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Run every variant on a batch ``(B, C, H, W)``; ``labels (B,)`` where there are some."""
        with evaluating(self.teacher, self.student):
            wanted = self.teacher(images).float()
            classes = wanted.argmax(dim=-1)
            for name, quantizers in self.variants.items():
                with only(self.student, quantizers):
                    got = self.student(images).float()
                if not bool(torch.isfinite(got).all()):
                    raise DataError(f"The model with {name} quantized gives a NaN or an infinity.")
                found, sums = got.argmax(dim=-1), self._sums[name]
                sums["same_class"] += 100 * int((found == classes).sum())
                sums["top1"] += 0 if labels is None else 100 * int((found == labels).sum())
                sums["distance"] += len(images) * float(output_distance(got, wanted, classes=self.classifies))
        self.images += len(images)
        if labels is not None:
            self.labelled += len(images)
            self._float_right += int((classes == labels).sum())

    def result(self) -> dict[str, dict[str, float]]:
        """Return the means of each variant: ``distance``, and in percent ``same_class`` and, with labels, ``top1``.

        The distance is that of :func:`qvit.quantization.outputs.output_distance`; feature extractors have no classes.
        """
        known = ["distance", *(["same_class"] if self.classifies else []), *(["top1"] if self.labelled else [])]
        return {name: {what: sums[what] / self.images for what in known} for name, sums in self._sums.items()}

    def float_top1(self) -> float | None:
        """Return the float model's top-1 in percent, where there are labels."""
        return 100 * self._float_right / self.labelled if self.labelled else None


def _kind(name: str, blocks: Sequence[str], attentions: Sequence[str]) -> str:
    if not name.startswith(tuple(blocks)):
        return OUTSIDE
    weights = name.endswith("weight_quantizer")
    if not name.startswith(tuple(attentions)):
        return "MLP weights" if weights else "MLP activations"
    if weights:
        return "attention weights"
    return "queries and keys" if name.endswith(_QUERIES_AND_KEYS) else _OTHER


def variants_of(places: Places) -> dict[str, list[str]]:
    """Return every part alone, and all but it (``but PART``), as quantizers by name."""
    every = list(places.kinds)
    variants = {part: places.of_part(part) for part in PARTS}
    for part in PARTS:
        if part != EVERYTHING:
            left_out = set(variants[part])
            variants[f"but {part}"] = [name for name in every if name not in left_out]
    return variants


def cells_of(places: Places) -> dict[str, list[str]]:
    """Return every kind of every block alone, as ``BLOCK KIND``."""
    return {f"{block} {kind}": places.of_block(block, kind) for block in places.blocks for kind in KINDS}


def grid_of(places: Places, measured: Mapping[str, Any], what: str) -> list[list[float]]:
    """Return what was measured of :func:`cells_of` as rows, one per kind, of a value per block."""
    return [[measured[f"{block} {kind}"][what] for block in places.blocks] for kind in KINDS]
