"""What a run shows: a progress line, a line per epoch, TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from qvit.train.run import Run


def step_line(run: Run, epochs: int) -> str:
    """Return what the progress bar says after a step."""
    progress = run.progress
    loss, top1 = (progress.sums[name] / progress.images for name in ("train_loss", "train_top1"))
    rate = progress.images / progress.seconds
    return f"epoch {progress.epoch + 1}/{epochs}  loss {loss:.3f}  top-1 {top1:.1f}  {rate:.0f} images/s"


def epoch_line(record: Mapping[str, float], epochs: int) -> str:
    """Return the line of an epoch that is done."""
    unreadable = f"  {record['unreadable']:.0f} unreadable images skipped" if record["unreadable"] else ""
    return (
        f"epoch {record['epoch']:>3.0f}/{epochs}  loss {record['train_loss']:.4f}  train {record['train_top1']:5.2f}  "
        f"val {record['val_top1']:5.2f} (top-5 {record['val_top5']:5.2f})  {record['images_per_second']:.0f} images/s"
        f"{unreadable}"
    )


def result_line(title: str, folder: Path, history: Sequence[Mapping[str, float]]) -> str:
    """Return what a finished run has come to: its best epoch and its last one, each with the file of its weights."""
    last = history[-1]
    best = max(history, key=lambda record: record["val_top1"])  # the first of equals, as best.pt is

    def told(record: Mapping[str, float]) -> str:
        return f"epoch {record['epoch']:.0f}, top-1 {record['val_top1']:.2f}, top-5 {record['val_top5']:.2f}"

    return (
        f"{title}, {last['val_images']:.0f} validation images: best {told(best)}, in {folder / 'best.pt'} (take this "
        f"one); last {told(last)}, in {folder / 'last.pt'}"
    )


def tensorboard(folder: Path, epochs: int, is_main: bool) -> contextlib.AbstractContextManager[SummaryWriter | None]:
    """Return TensorBoard's writer, or nothing in all processes but the first."""
    if not is_main:
        return contextlib.nullcontext()
    board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=epochs)
    return board


def progress_bar(console: Console) -> Progress:
    """Return the bar of a run, with its remaining time."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
