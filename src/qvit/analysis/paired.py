"""Two classifiers on the same images: what each has right, a paired test, and the images on which they differ."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from qvit.data.loader import Batch
from qvit.errors import CorruptImageError
from qvit.nn.modes import evaluating

KEPT = 12
"""Images of each kind of difference that are kept."""
_CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """What some images say of all images alike, in percent, and where that lies with a probability of 95 %.

    An interval and no standard error: that of 0 or 100 % would be 0, as if one image could prove something.
    """

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:.2f} ({self.low:.2f} to {self.high:.2f})"


class Difference(NamedTuple):
    """An image to which two models give different classes.

    Attributes:
        image: its number in the data set.
        label: its class; ``None`` where there are no labels.
        classes: what the first and the second model take it for.
    """

    image: int
    label: int | None
    classes: tuple[int, int]


class Right(NamedTuple):
    """Numbers of images that two models classify as their labels say: both of them, one alone, neither."""

    both: int
    first: int
    second: int
    neither: int


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Args:
        images: how many.
        unreadable: images that were left out.
        same: images to which both give the same class.
        right: how many are classified as labelled; ``None`` without labels.
        differences: some of the images to which they give different classes, chosen at random (the same ones each
            time), at most :data:`KEPT` of each kind, in the order of the data: right by the first model alone, by the
            second alone, by neither; without labels all are of one kind.
    """

    images: int
    unreadable: int
    same: int
    right: Right | None
    differences: list[list[Difference]]

    @property
    def agreement(self) -> Estimate:
        """Percentage of images to which both models give the same class."""
        return _proportion(self.same, self.images)

    @property
    def top1(self) -> tuple[Estimate, Estimate] | None:
        """Accuracy of either model; ``None`` without labels."""
        if self.right is None:
            return None
        both, first, second, _ = self.right
        return _proportion(both + first, self.images), _proportion(both + second, self.images)

    @property
    def gain(self) -> Estimate | None:
        """The second model's accuracy less the first's, on the same images; ``None`` without labels.

        The interval is that of Bonett and Price (2012): Wald's, with one image more that each model alone has right.
        """
        if self.right is None:
            return None
        first, second = ((alone + 1) / (self.images + 2) for alone in (self.right.first, self.right.second))
        middle = second - first
        reach = float(norm.ppf((1 + _CONFIDENCE) / 2)) * math.sqrt((first + second - middle**2) / (self.images + 2))
        gain = (self.right.second - self.right.first) / self.images
        return Estimate(100 * gain, 100 * max(middle - reach, -1.0), 100 * min(middle + reach, 1.0))

    @property
    def p_value(self) -> float | None:
        """McNemar's test, exact: how probable a gain as large (either way) is of models that are equally good.

        Of the images that one model alone has right, each model then has half: a binomial distribution.
        """
        if self.right is None:
            return None
        alone = self.right.first + self.right.second
        return float(binomtest(self.right.first, alone).pvalue) if alone else 1.0


@torch.no_grad()
def compare_classes(
    first: nn.Module, second: nn.Module, batches: Iterable[tuple[Batch, Batch]], device: torch.device, *, labelled: bool
) -> Paired:
    """Return how two models classify the same images; of these only counts and :data:`KEPT` numbers are kept.

    Args:
        first: gives logits.
        second: gives logits of the same classes.
        batches: the same images for the first and for the second model, each as it takes them.
        device: of both models.
        labelled: whether the batches' labels mean anything.

    Raises:
        CorruptImageError: if there is no image that can be read.
    """
    images = unreadable = same = 0
    right = torch.zeros(2, 2, dtype=torch.int64)
    kinds = [_Sample() for _ in range(3 if labelled else 1)]
    with evaluating(first, second):
        for pair in batches:
            labels, numbers = pair[0].labels, pair[0].numbers
            unreadable += len(pair[0].unreadable)
            if not len(labels):
                continue
            first_classes, second_classes = (
                _classes(model, batch, device) for model, batch in zip((first, second), pair, strict=True)
            )
            images += len(labels)
            same += int((first_classes == second_classes).sum())
            hits = first_classes == labels, second_classes == labels
            right += torch.bincount(2 * hits[0].long() + hits[1].long(), minlength=4).view(2, 2)
            for index in (first_classes != second_classes).nonzero()[:, 0].tolist():
                kind = 0 if not labelled or hits[0][index] else 1 if hits[1][index] else 2
                label = int(labels[index]) if labelled else None
                kinds[kind].add(
                    Difference(numbers[index], label, (int(first_classes[index]), int(second_classes[index])))
                )
    if not images:
        raise CorruptImageError("No image can be read, so there is nothing to compare.")
    (neither, second_alone), (first_alone, both) = right.tolist()
    counts = Right(both, first_alone, second_alone, neither) if labelled else None
    return Paired(images, unreadable, same, counts, [sorted(kind.kept) for kind in kinds])


def _classes(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    classes: Tensor = model(batch.images.to(device, non_blocking=True)).argmax(dim=-1).cpu()
    return classes


def _proportion(count: int, images: int) -> Estimate:
    """Return ``count`` of ``images`` with Wilson's interval (1927)."""
    interval = binomtest(count, images).proportion_ci(_CONFIDENCE, method="wilson")
    return Estimate(100 * count / images, 100 * float(interval.low), 100 * float(interval.high))


class _Sample:
    """At most :data:`KEPT` of a stream, each of it with the same probability (Vitter's algorithm R)."""

    def __init__(self) -> None:
        self.kept: list[Difference] = []
        self.seen, self.random = 0, random.Random(0)

    def add(self, difference: Difference) -> None:
        self.seen += 1
        if len(self.kept) < KEPT:
            self.kept.append(difference)
        elif (place := self.random.randrange(self.seen)) < KEPT:
            self.kept[place] = difference
