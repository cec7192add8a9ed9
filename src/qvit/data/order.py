"""Which images a step sees, in which order and with which randomness: a function of seed, epoch and step alone.

So a run that goes on in the middle of an epoch, on other machines or with other worker processes sees what the
uninterrupted one would have seen, and the processes of a run see each image once per epoch between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from qvit.errors import ConfigError


class Rank(NamedTuple):
    """Which of the ``processes`` that divide the images among them one is, counted from 0."""

    process: int = 0
    processes: int = 1


ALONE = Rank()


class Sample(NamedTuple):
    """The number of an image and the seed of its augmentation; ``None`` where nothing is drawn."""

    image: int
    seed: int | None = None


class TrainOrder(Sampler[list[Sample]]):
    """This process's micro-batches of one epoch: a new permutation per epoch, its tail that fills no batch left out.

    The global micro-batch ``m`` is the ``m``-th run of ``batch_size / accumulate`` images of the permutation, and
    process ``i`` of ``n`` takes every ``n``-th of it: how many processes there are changes who sees an image, not when.

    Args:
        images: how many there are.
        batch_size: images per optimizer step, over all processes; all of them if there are fewer.
        seed: of order and augmentation.
        repeats: copies of an image, one after the other (repeated augmentation, Hoffer et al., 2020); an epoch then
            shows ``1 / repeats`` of the images. 0 or 1 for none.
        accumulate: micro-batches per optimizer step.
        rank: which process this is.

    Raises:
        ConfigError: if a batch cannot be divided evenly.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, *, repeats: int = 0, accumulate: int = 1, rank: Rank = ALONE
    ) -> None:
        parts = accumulate * rank.processes
        if images < batch_size:  # one batch, as large as can be divided
            batch_size = images - images % parts
        if batch_size < parts or batch_size % parts:
            raise ConfigError(
                f"A batch of {batch_size} images cannot be divided evenly over {rank.processes} processes and "
                f"{accumulate} accumulated parts: give a batch_size that is a multiple of {parts}."
            )
        self.images, self.batch_size, self.seed, self.repeats = images, batch_size, seed, max(repeats, 1)
        self.accumulate, self.rank = accumulate, rank
        self.steps = images // batch_size
        """Optimizer steps per epoch."""
        self.epoch, self.first_step = 0, 0

    def begin(self, epoch: int, step: int = 0) -> None:
        """Set the epoch that the next iteration walks through, and the optimizer step that it starts at."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Sample]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.images, generator=generator).repeat_interleave(self.repeats)[: self.images].tolist()
        # NumPy takes seeds below 2^32.
        seeds = torch.randint(2**32, (self.images,), generator=generator).tolist()
        size = self.batch_size // self.accumulate
        for begin in range(self.first_step * self.batch_size, self.steps * self.batch_size, size):
            places = range(begin + self.rank.process, begin + size, self.rank.processes)
            yield [Sample(order[place], seeds[place]) for place in places]


class EvaluationOrder(Sampler[list[Sample]]):
    """This process's batches of all images, in order: every ``n``-th image, none of them twice to fill a batch.

    Args:
        images: how many there are.
        batch_size: images per batch of this process; the last one may be smaller.
        rank: which process this is.
    """

    def __init__(self, images: int, batch_size: int, rank: Rank = ALONE) -> None:
        self.numbers = range(rank.process, images, rank.processes)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        for begin in range(0, len(self.numbers), self.batch_size):
            yield [Sample(image) for image in self.numbers[begin : begin + self.batch_size]]
