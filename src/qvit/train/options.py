"""How a run is carried out, beside its recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from qvit.config import check_count
from qvit.data.order import Rank
from qvit.errors import ConfigError
from qvit.train.run import TEN_MINUTES, SaveEvery


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is carried out, beside its recipe.

    Args:
        out: folder for ``metrics.jsonl``, TensorBoard's files, ``last.pt``, ``previous.pt`` and ``best.pt``.
        seed: of weights, order and augmentation.
        workers: processes that decode images, for each process that trains.
        precision: ``"no"`` for float32, ``"bf16"`` for autocast.
        compile: whether to ``torch.compile`` the model and the teacher.
        skip_corrupt: go on without images that cannot be read, and count them.
        resume: go on from ``last.pt``.
        cpu: do not use a GPU.
        accumulate: parts in which a batch is computed, one after the other, where it would not fit in memory.
        fsdp: shard weights, gradients and optimizer over the processes (FSDP2) instead of copying them (DDP).
        save_every: how often to save inside an epoch; it is saved after each epoch anyway.

    Raises:
        ConfigError: for a folder that TensorBoard cannot write to.
    """

    out: Path
    seed: int = 0
    workers: int = 0
    precision: str = "no"
    compile: bool = False
    skip_corrupt: bool = False
    resume: bool = False
    cpu: bool = False
    accumulate: int = 1
    fsdp: bool = False
    save_every: SaveEvery = TEN_MINUTES

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0)
        check_count("workers", self.workers, 0)
        check_count("accumulate", self.accumulate)
        try:
            str(self.out).encode()
        except UnicodeEncodeError:  # of bytes that are not UTF-8 Python makes halves of surrogate pairs
            raise ConfigError(
                f"TensorBoard cannot write to {self.out}: that name is not UTF-8, give another."
            ) from None


def make_accelerator(options: Options) -> Accelerator:
    """Return the processes, device, precision and accumulation of a run.

    Under ``torchrun``, or ``accelerate launch`` on GPUs, it joins the other processes.
    """
    # Accelerate keeps the first precision for the life of the process; runs that follow one another may differ.
    AcceleratorState._reset_state()
    # Only where it is told to use the CPU does it know of the other processes there.
    cpu = options.cpu or not torch.accelerator.is_available()
    return Accelerator(mixed_precision=options.precision, cpu=cpu, gradient_accumulation_steps=options.accumulate)


def rank_of(accelerator: Accelerator) -> Rank:
    """Return which part of the images this process takes."""
    return Rank(accelerator.process_index, accelerator.num_processes)
