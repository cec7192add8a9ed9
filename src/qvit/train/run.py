"""A run on disk: what it keeps beside the model, and how it is taken up again as if it had never stopped.

``last.pt`` holds the model, the optimizer, the averaged weights, the oscillation of weights, the random generators of
every process, the data order, and how far the run has come; ``previous.pt`` is the one before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.text import Text
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from qvit.data.order import TrainOrder
from qvit.data.randomness import random_state, set_random_state
from qvit.errors import CheckpointError, ConfigError, NewerCheckpointError, NonFiniteLossError
from qvit.files import printable
from qvit.models.checkpoint import check_weights, read_checkpoint, write_checkpoint
from qvit.models.spec import ModelSpec
from qvit.train.distributed import whole_weights
from qvit.train.oscillation import Oscillation
from qvit.train.saved import broken, check_like, check_training, optimizer_state
from qvit.train.settings import differences

LAST, PREVIOUS, DAMAGED = "last.pt", "previous.pt", "damaged.pt"
METRICS = "metrics.jsonl"


class SaveEvery(NamedTuple):
    """How often a run is saved inside an epoch: after so many steps, or so many seconds; 0 for never."""

    steps: int = 0
    seconds: float = 600.0

    @classmethod
    def parse(cls, text: str) -> SaveEvery:
        """Read ``"500"`` (steps), ``"10m"`` or ``"30s"``.

        Raises:
            ConfigError: for anything else.
        """
        match = re.fullmatch(r"(\d+)([ms]?)", text.strip())
        if match is None or int(match[1]) == 0:
            raise ConfigError(f"--save-every takes minutes (10m), seconds (30s) or steps (500), not {text!r}.")
        number = int(match[1])
        if not match[2]:
            return cls(steps=number, seconds=0.0)
        return cls(seconds=number * (60.0 if match[2] == "m" else 1.0))


TEN_MINUTES = SaveEvery()


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Args:
        epoch: finished epochs.
        step: optimizer steps done in the running one.
        images: images seen in the running one.
        unreadable: images that could not be read in the running one.
        sums: measurements of the running epoch, times images.
        seconds: time that the running epoch's training has taken.
        history: a record per epoch, as ``metrics.jsonl`` holds them.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    unreadable: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def next_epoch(self, record: dict[str, float]) -> None:
        """Close the running epoch with its record and begin the next."""
        self.epoch, self.step, self.images, self.unreadable, self.sums, self.seconds = self.epoch + 1, 0, 0, 0, {}, 0.0
        self.history.append(record)

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"the end of epoch {self.epoch}"


class Saved(NamedTuple):
    """A checkpoint that a run goes on from: its file, and what :meth:`Run.save` wrote."""

    path: Path
    weights: dict[str, Tensor]
    training: dict[str, Any]


@dataclasses.dataclass
class Run:
    """All that has to be kept so that a run can go on, and the folder where it is kept.

    Args:
        folder: of the checkpoints.
        spec: what the model is.
        model: as it is trained, maybe in several processes.
        optimizer: its optimizer.
        order: of the training images.
        settings: what the result depends on (:func:`qvit.train.settings.settings_of`).
        accelerator: the processes.
        oscillation: of the quantized weights, if there are any.
        ema: averaged weights, if there are any.
        progress: how far it has come.
    """

    folder: Path
    spec: ModelSpec
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: TrainOrder
    settings: dict[str, Any]
    accelerator: Accelerator
    oscillation: Oscillation | None
    ema: ModelEmaV3 | None
    progress: Progress = dataclasses.field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.saved_at = time.monotonic()

    def is_due(self, every: SaveEvery) -> bool:
        """Say whether this process wants to save after the step that is being made."""
        if every.steps:
            return (self.progress.epoch * self.order.steps + self.progress.step + 1) % every.steps == 0
        # The others have clocks of their own.
        return self.accelerator.is_main_process and 0 < every.seconds <= time.monotonic() - self.saved_at

    def weights(self) -> dict[str, Any]:
        """Return the weights that are evaluated: the averaged ones if there are any. All processes must call it."""
        return whole_weights(self.model if self.ema is None else self.ema.module)

    def save(self, *, best: bool = False) -> None:
        """Write ``last.pt``, and before it ``best.pt`` if the weights are the ``best``; all processes must call it.

        Raises:
            NonFiniteLossError: if a weight is NaN or infinite; nothing is written then.
            OutputError: if a file cannot be written; what was there before is kept.
        """
        trained = whole_weights(self.model)
        for name, value in trained.items():
            if not torch.isfinite(value).all():
                raise NonFiniteLossError(non_finite_message(self, f"the weights of {name}"))
        weights = self.weights()
        training = {
            "trained": None if self.ema is None else trained,
            "optimizer": get_optimizer_state_dict(
                self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            ),
            "oscillation": None if self.oscillation is None else self.oscillation.state_dict(),
            "random": gather_object([random_state()]),
            "order": self.settings,
            "progress": dataclasses.asdict(self.progress),
        }
        if self.accelerator.is_main_process:
            if best:
                write_checkpoint(self.folder / "best.pt", self.spec, weights)
            write_checkpoint(self.folder / LAST, self.spec, weights, training, previous=self.folder / PREVIOUS)
        self.saved_at = time.monotonic()

    def restore(self, saved: Saved) -> None:
        """Put all but the model's weights, which are set before it is spread over processes, where ``saved`` has it.

        Raises:
            CheckpointError: if something of it is absent or does not fit.
        """
        training = saved.training
        if (training["trained"] is None) != (self.ema is None):
            raise broken(saved.path, "only one of it and this run averages the weights")
        if training["progress"]["step"] > self.order.steps:
            raise broken(saved.path, f"it has made {training['progress']['step']} steps of {self.order.steps} an epoch")
        followed = None if self.oscillation is None else self.oscillation.state
        check_like(training["oscillation"], followed, "training.oscillation", saved.path)
        state = optimizer_state(training["optimizer"], get_optimizer_state_dict(self.model, self.optimizer), saved.path)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=StateDictOptions(full_state_dict=True))
        if self.oscillation is not None:
            self.oscillation.load_state_dict(training["oscillation"])
        self.progress = Progress(**training["progress"])
        try:
            if len(training["random"]) == self.accelerator.num_processes:
                set_random_state(training["random"][self.accelerator.process_index])
        except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise broken(saved.path, "training.random is no state of random number generators") from error


def can_go_on(folder: Path) -> bool:
    """Say whether a folder holds a run's checkpoint."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def read_last(folder: Path, spec: ModelSpec, settings: Mapping[str, Any], console: Console) -> Saved:
    """Return the newest checkpoint of a run that can be read: ``last.pt``, or the one before it, and say so.

    Raises:
        CheckpointError: if neither can be read, or it is of another model, or of a run with other ``settings``.
    """
    path = folder / LAST
    try:
        saved_spec, weights, training = read_checkpoint(path)
    except NewerCheckpointError:
        raise
    except CheckpointError as error:
        path = folder / PREVIOUS
        if not path.exists():
            raise
        saved_spec, weights, training = read_checkpoint(path)
        said = Text(printable(f"{error} Falling back to {path.name}, the one before it."))
        console.print(said, soft_wrap=True)
    same = ("name", "quant_config", "model_args", "classes")
    if training is None or any(getattr(saved_spec, field) != getattr(spec, field) for field in same):
        raise CheckpointError(f"{path} is of another model or another run: give the same arguments, or another --out.")
    check_training(training, path)
    other = differences(training["order"], settings)
    if other:
        raise CheckpointError(
            f"{path} is of a run with {other}: a resumed run is the same run, so give it the same settings, or start "
            "another one with another --out (a quantized one maybe from that checkpoint, with --initial-model)."
        )
    for state in (weights, training["trained"]):
        if state is not None:
            check_weights(saved_spec, state, path)
    return Saved(path, weights, training)


def tidy(folder: Path, saved: Saved) -> None:
    """Put a damaged ``last.pt`` aside, so that it never replaces the good one, and remove unfinished files."""
    if saved.path.name != LAST and (folder / LAST).exists():
        os.replace(folder / LAST, folder / DAMAGED)
    for unfinished in folder.glob(".*.pt.*"):
        unfinished.unlink()


def non_finite_message(run: Run, where: str) -> str:
    """Return the sentence that tells at what step, where, and what checkpoint is kept."""
    quantized = run.spec.quant_config is not None
    way = ", maybe from that checkpoint (--initial-model)" if quantized and can_go_on(run.folder) else ""
    return (
        f"The loss became NaN or infinite in {_now(run)}, first in {where}; {_kept(run.folder)}. Start anew with a "
        f"lower learning rate (--set {'quantized' if quantized else 'full_precision'}.lr=...) and another --out{way}."
    )


def stopped_message(run: Run) -> str:
    """Return the sentence that tells where SIGTERM has stopped a run that is saved, and how to go on."""
    return f"Stopped by SIGTERM at {run.progress}; {run.folder / LAST} is saved: {_GO_ON}."


@contextlib.contextmanager
def says_what_is_kept(run: Run) -> Iterator[None]:
    """Let Ctrl-C end the block at once, and say what is saved and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        go_on = f": {_GO_ON}" if can_go_on(run.folder) else ""
        raise KeyboardInterrupt(f"Interrupted in {_now(run)}; {_kept(run.folder)}{go_on}.") from None


_GO_ON = "the same command goes on there (qvit train with --resume)"


def _now(run: Run) -> str:
    return f"epoch {run.progress.epoch + 1}, step {run.progress.step + 1}"


def _kept(folder: Path) -> str:
    """Say what the newest checkpoint of this run holds; between two renames that is the one before the last."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            _, _, training = read_checkpoint(path)
            assert training is not None  # this run wrote it
            return f"{path} holds {Progress(**training['progress'])}"
    return "nothing was saved before"
