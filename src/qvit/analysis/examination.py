"""One model looked at from every side while images pass by, each once; nothing that is kept grows with their number."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from qvit.analysis.attention_range import AttentionGrid, AttentionRange
from qvit.analysis.divergence import divergence
from qvit.analysis.noise import ModelNoise
from qvit.analysis.statistics import AttentionDistance, RunningStatistics
from qvit.errors import DataError
from qvit.models.families import classifies
from qvit.models.queries import Attended, attention_layers, run_with_attention
from qvit.nn.modes import evaluating
from qvit.nn.quantizer import has_quantizers


class Examination:
    """Adds up what is asked of one model (docs/method.md, section 6).

    Args:
        model: float, or quantized and calibrated.
        grids: of :func:`qvit.analysis.attention_range.attention_grids`.
        reference: the examination of the model that it is compared with, which sees every batch first; it must have as
            many layers, heads and tokens.

    Raises:
        UncalibratedError: if the model is quantized and has no scales yet.
    """

    def __init__(self, model: nn.Module, grids: list[AttentionGrid], reference: Examination | None = None) -> None:
        self.model, self.reference, self.grids = model, reference, grids
        layers = attention_layers(model)
        others = [None] * len(layers) if reference is None else reference.statistics
        self.statistics: list[RunningStatistics] = [
            RunningStatistics(index, layer, other)
            for index, (layer, other) in enumerate(zip(layers, others, strict=True))
        ]
        self.range = AttentionRange(grids)
        self.distance = None if reference is None else AttentionDistance()
        self.noise = ModelNoise(model) if has_quantizers(model) else None
        self.images = self.labelled = self.right = self.same = 0

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None, reference: Attended | None = None) -> Attended:
        """Run the model on a batch and take in what happens in it.

        Args:
            images: ``(B, C, H, W)`` on the model's device; all maps of the batch are in memory together.
            labels: ``(B,)``, where there are some.
            reference: what the reference gave for this batch.

        Returns:
            What the model gave.

        Raises:
            DataError: if a NaN or an infinity comes out.
            TeacherMismatchError: if layers, heads or tokens differ from the reference's.
        """
        with evaluating(self.model), contextlib.nullcontext() if self.noise is None else self.noise.watching():
            attended = run_with_attention(self.model, images)
        if not bool(torch.isfinite(attended.output).all()):
            raise DataError("The model gives a NaN or an infinity: check it and the images.")
        for statistics, queries, keys in zip(self.statistics, attended.queries, attended.keys, strict=True):
            statistics.add(queries, keys)
        self.range.add(attended.maps)
        classes = attended.output.argmax(dim=-1)
        if reference is not None and self.distance is not None:
            self.distance.add(reference.maps, attended.maps)
            self.same += int((reference.output.argmax(dim=-1) == classes).sum())
        if labels is not None:
            self.labelled += len(labels)
            self.right += int((classes == labels).sum())
        self.images += len(images)
        return attended

    def result(self) -> dict[str, Any]:
        """Return plain data: ``top1`` and ``same_class`` in percent, ``layers`` and ``quantizers``.

        A layer has the entries of :class:`QueryKeyStatistics`, its name, ``attention_range`` (pixels by head) and,
        where there is a reference, ``attention_distance`` by head, ``query_divergence`` and ``key_divergence`` (bits).
        A quantizer has those of :class:`QuantizerNoise`.
        """
        found = [statistics.result() for statistics in self.statistics]
        layers: list[dict[str, Any]] = [
            {"name": grid.name, **layer.to_dict(), "attention_range": pixels}
            for grid, layer, pixels in zip(self.grids, found, self.range.result(), strict=True)
        ]
        result: dict[str, Any] = {"layers": layers, "quantizers": []}
        if self.noise is not None:
            result["quantizers"] = [asdict(noise) for noise in self.noise.result()]
        if self.labelled:
            result["top1"] = 100 * self.right / self.labelled
        if self.reference is not None and self.distance is not None:
            if classifies(self.model):
                result["same_class"] = 100 * self.same / self.images
            compared = zip(layers, found, self.reference.statistics, self.distance.result(), strict=True)
            for record, layer, other, distance in compared:
                record["query_divergence"], record["key_divergence"] = divergence(other.result(), layer)
                record["attention_distance"] = distance.tolist()
        return result
