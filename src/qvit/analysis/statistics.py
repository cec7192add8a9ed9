"""Statistics of queries, keys and maps: the paper's Figure 1 as numbers (docs/method.md, sections 2 and 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvit.errors import DataError, TeacherMismatchError, UnsupportedModelError
from qvit.models.queries import attention_layers, run_with_maps, run_with_queries
from qvit.nn.attention import QuantAttention
from qvit.nn.modes import evaluating
from qvit.nn.quantizer import Quantizer
from qvit.quantization.images import images_of

BINS = 100
OUTSIDE = 0.1
"""Percent of the first batch's queries left out of the histogram on either side."""
_IMAGES_AT_ONCE = 8  # whose N x N attention maps are in memory together


@dataclass(frozen=True)
class QueryKeyStatistics:
    """Queries and keys of one attention layer, as they are just before they are quantized: q~ and k~ where rectified.

    Attributes:
        layer: index of the layer, from 0.
        query_mean: mean of the queries, over images, heads, tokens and channels.
        query_std: their standard deviation (biased).
        key_mean: mean of the keys.
        key_std: their standard deviation (biased).
        values: number of query values seen.
        counts: ``(BINS,)`` query values a bin; those outside ``edges`` (some 0.2 %) are in no bin.
        edges: ``(BINS + 1,)`` borders of the bins.
        query_entropy: bits, mean over the heads of the entropy of each head's query codes; ``None`` in a float model.
        key_entropy: the same of the keys.
        query_bits: bound of ``query_entropy``, the quantizer's bits; ``None`` in a float model.
        key_bits: bound of ``key_entropy``.
        key_counts: as ``counts``, of the keys; empty in records that were written without it.
        key_edges: borders of its bins.
    """

    layer: int
    query_mean: float
    query_std: float
    key_mean: float
    key_std: float
    values: int
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    query_entropy: float | None
    key_entropy: float | None
    query_bits: int | None
    key_bits: int | None
    key_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    key_edges: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for a JSON file."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QueryKeyStatistics:
        """Return what :meth:`to_dict` made; other entries are ignored."""
        values = {entry.name: data[entry.name] for entry in fields(cls) if entry.name in data}
        return cls(**values | {name: np.array(value) for name, value in values.items() if isinstance(value, list)})


def code_entropy(codes: Tensor, levels: int) -> float:
    """Return the entropy in bits of integer ``codes`` of any shape, at most ``log2(levels)``.

    It is the plug-in estimate ``-sum p log2 p`` with ``p`` the relative frequencies.

    Raises:
        DataError: if there are no codes, or more different ones than ``levels``.
    """
    _, counts = codes.unique(return_counts=True)
    if not 0 < len(counts) <= levels:
        raise DataError(f"{len(counts)} different codes cannot be of a quantizer with {levels} levels.")
    return _entropy(counts.cpu())


def query_key_statistics(model: nn.Module, batches: Iterable[Any]) -> list[QueryKeyStatistics]:
    """Return the statistics of every attention layer of a float or quantized vision transformer.

    The model is run in evaluation mode, a batch at a time, and what was seen before is kept as counts and sums only.
    The first batch chooses the bins of the histogram.

    Args:
        model: timm's vision transformer, or what :func:`qvit.quantize` made of one, calibrated.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one.

    Raises:
        UnsupportedModelError: if the model has no attention layer that qvit knows.
        DataError: if there are no images, or they make a NaN or an infinity.
        UncalibratedError: if the model is quantized and has no scales yet.
    """
    layers = _layers(model)
    running = [RunningStatistics(index, layer) for index, layer in enumerate(layers)]
    with evaluating(model), torch.no_grad():
        for images in _images(batches):
            _, queries, keys = run_with_queries(model, images.to(_device(model)))
            for statistics, q, k in zip(running, queries, keys, strict=True):
                statistics.add(q, k)
    return [statistics.result() for statistics in running]


def attention_distance(teacher: nn.Module, student: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Return how far the student's attention is from the teacher's, ``(L, H)``, between 0 and 1.

    With the attention map ``P = softmax(scale q k^T + bias)`` of the teacher and ``P'`` of the student, ``(N, N)`` for
    each image (or window of it), layer and head, the distance is that of total variation between their rows, the
    distributions over keys that a query attends with:

        1/2 sum_j |P_ij - P'_ij| ,   mean over query tokens i, windows and images

    Of a float model q and k are what enters the attention product; of a quantized one the values of their codes. The
    map is taken before its own quantizer, so the distance is that of queries and keys alone.

    Args:
        teacher: float (or quantized) vision transformer.
        student: quantized (or float) one with the same number of layers, heads and tokens.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one.

    Returns:
        float64 on the CPU; NaN for heads that a layer does not have, where layers differ in their number.

    Raises:
        TeacherMismatchError: if layers, heads or tokens differ, saying how.
        UnsupportedModelError: if a model has no attention layer that qvit knows.
        DataError: if there are no images.
        UncalibratedError: if a model is quantized and has no scales yet.
    """
    models = (teacher, student)
    for model in models:
        _layers(model)
    distance = AttentionDistance()
    with evaluating(*models), torch.no_grad():
        for batch in _images(batches):
            for images in batch.split(_IMAGES_AT_ONCE):
                teacher_maps, student_maps = (run_with_maps(model, images.to(_device(model)))[1] for model in models)
                distance.add(teacher_maps, student_maps)
    return torch.nn.utils.rnn.pad_sequence(distance.result(), batch_first=True, padding_value=math.nan)


class AttentionDistance:
    """What :func:`attention_distance` is computed from, batch by batch."""

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._rows: list[int] = []

    def add(self, teacher_maps: list[Tensor], student_maps: list[Tensor]) -> None:
        """Take in the maps of every layer of teacher and student, ``(B, H, N, N)`` each.

        Raises:
            TeacherMismatchError: if layers, heads or tokens differ, saying how.
        """
        _check_comparable(teacher_maps, student_maps)
        distances = [_distance(*pair) for pair in zip(teacher_maps, student_maps, strict=True)]
        counts = [maps.shape[0] * maps.shape[2] for maps in teacher_maps]
        if self._totals:
            distances = [a + b for a, b in zip(self._totals, distances, strict=True)]
            counts = [a + b for a, b in zip(self._rows, counts, strict=True)]
        self._totals, self._rows = distances, counts

    def result(self) -> list[Tensor]:
        """Return the mean distance by head, ``(H,)`` float64 for every layer."""
        return [total / count for total, count in zip(self._totals, self._rows, strict=True)]


class RunningStatistics:
    """What :class:`QueryKeyStatistics` is computed from, for one layer, batch by batch.

    Args:
        index: of the layer.
        layer: its attention.
        bins_of: the statistics whose bins are taken, and which see the first batch first; ``None`` to choose them.
    """

    def __init__(self, index: int, layer: nn.Module, bins_of: RunningStatistics | None = None) -> None:
        self.index = index
        self.queries: _Distribution = _Distribution(None if bins_of is None else bins_of.queries)
        self.keys: _Distribution = _Distribution(None if bins_of is None else bins_of.keys)
        self.query_codes = self.key_codes = None
        if isinstance(layer, QuantAttention):
            self.query_codes = _CodeCounts(layer.query_quantizer, layer.num_heads)
            self.key_codes = _CodeCounts(layer.key_quantizer, layer.num_heads)

    def add(self, q: Tensor, k: Tensor) -> None:
        """Take in the queries and keys of a batch, ``(B, H, N, D)``.

        Raises:
            DataError: if they hold a NaN or an infinity.
        """
        for distribution, values in ((self.queries, q), (self.keys, k)):
            if not bool(torch.isfinite(values).all()):
                raise DataError(f"The queries or keys of attention layer {self.index} hold a NaN or an infinity.")
            distribution.add(values.float().cpu().numpy())
        if self.query_codes is not None and self.key_codes is not None:
            self.query_codes.add(q)
            self.key_codes.add(k)

    def result(self) -> QueryKeyStatistics:
        """Return the statistics of all that was taken in."""
        return QueryKeyStatistics(
            layer=self.index,
            query_mean=self.queries.mean,
            query_std=self.queries.std,
            key_mean=self.keys.mean,
            key_std=self.keys.std,
            values=self.queries.count,
            counts=self.queries.counts,
            edges=self.queries.edges,
            query_entropy=None if self.query_codes is None else self.query_codes.entropy(),
            key_entropy=None if self.key_codes is None else self.key_codes.entropy(),
            query_bits=None if self.query_codes is None else self.query_codes.quantizer.bits,
            key_bits=None if self.key_codes is None else self.key_codes.quantizer.bits,
            key_counts=self.keys.counts,
            key_edges=self.keys.edges,
        )


class _Distribution:
    """Mean, standard deviation and histogram of a stream of values.

    Its first values choose the bins, unless those of another one are to be taken.
    """

    def __init__(self, bins_of: _Distribution | None) -> None:
        self.count, self.sum, self.sum_of_squares = 0, 0.0, 0.0
        self.counts, self.edges = np.zeros(BINS, np.int64), np.zeros(BINS + 1)
        self.bins_of = bins_of

    def add(self, values: NDArray[np.float32]) -> None:
        if not self.count and self.bins_of is not None:
            self.edges = self.bins_of.edges
        elif not self.count:
            low, high = np.percentile(values, [OUTSIDE, 100 - OUTSIDE])
            self.edges = np.histogram_bin_edges([], BINS, (low, high))
        self.counts += np.histogram(values, BINS, (self.edges[0], self.edges[-1]))[0]
        self.count += values.size
        self.sum += float(values.sum(dtype=np.float64))
        self.sum_of_squares += float(np.square(values, dtype=np.float64).sum())

    @property
    def mean(self) -> float:
        return self.sum / self.count

    @property
    def std(self) -> float:
        return math.sqrt(max(self.sum_of_squares / self.count - self.mean**2, 0.0))


class _CodeCounts:
    """How often each head has used each code of a quantizer with one scale per head."""

    def __init__(self, quantizer: Quantizer, heads: int) -> None:
        self.quantizer = quantizer
        self.counts = torch.zeros(heads, 2**quantizer.bits, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        heads, levels = self.counts.shape
        codes = self.quantizer.codes(x).long() - self.quantizer.low
        head = torch.arange(heads, device=x.device).view(heads, 1, 1)
        self.counts += torch.bincount((head * levels + codes).flatten(), minlength=heads * levels).view(heads, -1).cpu()

    def entropy(self) -> float:
        """Return the mean over heads, in bits."""
        return sum(_entropy(head) for head in self.counts) / len(self.counts)


def _entropy(counts: Tensor) -> float:
    """Return the entropy in bits of the relative frequencies of ``counts``."""
    p = counts[counts > 0].double()
    p = p / p.sum()
    return float((p * -p.log2()).sum())


def _distance(teacher_map: Tensor, student_map: Tensor) -> Tensor:
    """Return the total variation distances of one layer's maps ``(B, H, N, N)``, summed over images and rows: (H,)."""
    difference = teacher_map.float() - student_map.float().to(teacher_map.device)
    return difference.abs().sum(dim=(0, 2, 3)).double().cpu() / 2


def _check_comparable(teacher_maps: list[Tensor], student_maps: list[Tensor]) -> None:
    for what, a, b in (
        ("attention layers", len(teacher_maps), len(student_maps)),
        *(("attention heads", a.shape[1], b.shape[1]) for a, b in zip(teacher_maps, student_maps, strict=False)),
        *(("tokens", a.shape[2], b.shape[2]) for a, b in zip(teacher_maps, student_maps, strict=False)),
    ):
        if a != b:
            raise TeacherMismatchError(
                f"Attention maps cannot be compared: the teacher has {a} {what}, the student {b}."
            )


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = attention_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no attention layer of a kind that qvit knows.")
    return layers


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _images(batches: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the images of every batch that has some.

    Raises:
        DataError: if none has.
    """
    seen = False
    for batch in batches:
        images = images_of(batch)
        if len(images):
            seen = True
            yield images
    if not seen:
        raise DataError("The statistics need at least one image, and there was none.")
