"""The training loop and the evaluation, read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from qvit.errors import CheckpointError, ConfigError, NonFiniteLossError
from qvit.files import write_text
from qvit.nn.quantizer import Float32Module
from qvit.train.checkpoint import ModelCard, build, read_checkpoint, save_checkpoint
from qvit.train.data import Batch, readable
from qvit.train.recipe import Schedule


class Loss(Protocol):
    """What the loop trains with: :class:`qvit.DistillationLoss` or :class:`LabelLoss`."""

    last_parts: dict[str, Tensor]

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss."""


class LabelLoss(nn.Module):
    """Cross-entropy against the labels, for a float model or for quantization-aware training without a teacher."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.last_parts: dict[str, Tensor] = {}

    def forward(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``student`` on ``images (B, C, H, W)`` with class numbers ``labels (B,)``."""
        logits = student(images)
        self.last_parts = {"logits": logits.detach()}
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of images (0..100) whose class is the first, or among the first five, and of how many images."""

    top1: float
    top5: float
    images: int
    unreadable: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is carried out, beside its recipe.

    Args:
        out: folder for ``metrics.jsonl``, TensorBoard's files, ``last.pt`` and ``best.pt``.
        seed: of weights, order and augmentation.
        workers: processes that decode images.
        precision: ``"no"`` for float32, ``"bf16"`` for autocast.
        compile: whether to ``torch.compile`` the model and the teacher.
        skip_corrupt: go on without images that cannot be read, and count them.
        resume: go on from ``last.pt``.
        cpu: do not use a GPU.
    """

    out: Path
    seed: int = 0
    workers: int = 0
    precision: str = "no"
    compile: bool = False
    skip_corrupt: bool = False
    resume: bool = False
    cpu: bool = False


def make_accelerator(options: Options) -> Accelerator:
    """Return the device and precision of a run.

    Raises:
        ConfigError: under a multi-process launcher, which the loop does not support.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("qvit trains in one process: start it without torchrun or accelerate launch.")
    # Accelerate keeps the first precision for the life of the process; runs that follow one another may differ.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=options.precision, cpu=options.cpu)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Batch], device: torch.device, *, skip_corrupt: bool = False
) -> Accuracy:
    """Return the accuracy of ``model`` over all images of ``loader``.

    Raises:
        CorruptImageError: naming the first image that cannot be read, unless ``skip_corrupt``.
    """
    was_training = model.training
    model.eval()
    first = fifth = images = unreadable = 0
    start = time.perf_counter()
    for batch in readable(loader, skip_corrupt=skip_corrupt):
        unreadable += len(batch.unreadable)
        if len(batch.labels) == 0:
            continue
        logits = model(batch.images.to(device, non_blocking=True))
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == batch.labels.to(device)[:, None]
        first += int(ranked[:, 0].sum())
        fifth += int(ranked.any(dim=1).sum())
        images += len(batch.labels)
    model.train(was_training)
    share = 100.0 / max(images, 1)
    return Accuracy(first * share, fifth * share, images, unreadable, time.perf_counter() - start)


def fit(
    model: VisionTransformer,
    loss_fn: Loss,
    train: DataLoader[Batch],
    val: DataLoader[Batch],
    schedule: Schedule,
    card: ModelCard,
    options: Options,
    console: Console,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return one record an epoch, as ``metrics.jsonl`` holds them.

    Randomness is drawn anew from ``(seed, epoch)`` at the start of every epoch, so a run that is resumed from
    ``last.pt`` goes on exactly as it would have.

    Args:
        model: a float model, or a calibrated quantized one; ends with its last weights, ``best.pt`` holds the best.
        loss_fn: see :class:`Loss`.
        train: training batches.
        val: validation batches, evaluated after each epoch.
        schedule: budget and optimizer.
        card: what goes into the checkpoints.
        options: folder, seed, precision, ....
        console: where progress is shown.

    Raises:
        NonFiniteLossError: at the first NaN or infinity; the checkpoints of the epochs before are kept.
        CorruptImageError: see :func:`qvit.train.data.readable`.
        CheckpointError: if ``resume`` finds no checkpoint that fits.
        OutputError: if a file cannot be written; what was there before is kept.
    """
    accelerator = make_accelerator(options)
    device, steps = accelerator.device, len(train)
    model.to(device)
    if isinstance(loss_fn, nn.Module):
        loss_fn.to(device)
    optimizer = create_optimizer_v2(
        parameter_groups(model, schedule),
        opt=schedule.optimizer,
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        **schedule.optimizer_args,
    )
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs * steps,
        warmup_t=round(schedule.warmup_epochs * steps),
        warmup_lr_init=0.0,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    history: list[dict[str, float]] = []
    if options.resume:
        history = _resume(model, optimizer, card, options.out)
        scheduler.step_update(len(history) * steps)
    _write_metrics(options.out, history)
    if options.compile:
        model.compile()
        teacher = getattr(loss_fn, "teacher", None)
        if teacher is not None:
            teacher.compile()
    best = max((record["val_top1"] for record in history), default=-math.inf)

    with (
        SummaryWriter(str(options.out / "tensorboard"), purge_step=len(history)) as board,
        _progress(console) as progress,
    ):
        task = progress.add_task("", total=schedule.epochs * steps, completed=len(history) * steps, rate=0.0)
        for epoch in range(len(history), schedule.epochs):
            set_seed(options.seed * 100_003 + epoch)
            if hasattr(train.sampler, "set_epoch"):
                train.sampler.set_epoch(options.seed * 100_003 + epoch)
            model.train()
            totals: dict[str, float] = {}
            seen = correct = skipped = 0
            start = time.perf_counter()
            for step, batch in enumerate(readable(train, skip_corrupt=options.skip_corrupt)):
                skipped += len(batch.unreadable)
                if len(batch.labels) == 0:
                    continue
                images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
                with accelerator.autocast():
                    loss = loss_fn(model, images, labels)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise NonFiniteLossError(_non_finite(epoch, step, options.out, history))
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step_update(epoch * steps + step + 1)

                parts = {name: float(part) for name, part in loss_fn.last_parts.items() if part.ndim == 0}
                for name, part in {"train_loss": value, **parts}.items():
                    totals[name] = totals.get(name, 0.0) + part * len(labels)
                correct += int((loss_fn.last_parts["logits"].argmax(dim=-1) == labels).sum())
                seen += len(labels)
                rate = seen / (time.perf_counter() - start)
                progress.update(
                    task,
                    advance=1,
                    description=f"epoch {epoch + 1}/{schedule.epochs}  loss {totals['train_loss'] / seen:.3f}  "
                    f"top-1 {100 * correct / seen:.1f}  {rate:.0f} images/s",
                )
            seconds = time.perf_counter() - start
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                raise NonFiniteLossError(_non_finite(epoch, steps - 1, options.out, history))
            accuracy = evaluate(model, val, device, skip_corrupt=options.skip_corrupt)
            record = {
                "epoch": epoch + 1,
                **{name: total / max(seen, 1) for name, total in totals.items()},
                "train_top1": 100 * correct / max(seen, 1),
                "val_top1": accuracy.top1,
                "val_top5": accuracy.top5,
                "val_images": accuracy.images,
                "unreadable": skipped + accuracy.unreadable,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": seen / seconds,
                "seconds": seconds + accuracy.seconds,
            }
            history.append(record)
            for name, scalar in record.items():
                board.add_scalar(name, scalar, epoch + 1)
            card.metrics = {"val_top1": accuracy.top1, "val_top5": accuracy.top5, "val_images": accuracy.images}
            if accuracy.top1 > best:
                best = accuracy.top1
                save_checkpoint(options.out / "best.pt", card, model)
            training = {"optimizer": optimizer.state_dict(), "history": history}
            save_checkpoint(options.out / "last.pt", card, model, training)
            _write_metrics(options.out, history)
            progress.console.print(_epoch_line(record, schedule.epochs), highlight=False)
    return history


def parameter_groups(model: VisionTransformer, schedule: Schedule) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices with weight decay, vectors without, scales and such at ``scale_lr``."""
    own = {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, Float32Module)
        for name, parameter in module.named_parameters(recurse=False)
    }
    kept_out = set(model.no_weight_decay()) | set(own)
    groups = param_groups_weight_decay(model, schedule.weight_decay, no_weight_decay_list=kept_out)
    mine = {id(parameter) for parameter in own.values()}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mine]
    if own:
        lr = schedule.lr * schedule.scale_lr
        groups.append({"params": list(own.values()), "weight_decay": 0.0, "lr": lr})
    return groups


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the records of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write_metrics(folder: Path, history: Iterable[Mapping[str, float]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in history)
    write_text(folder / "metrics.jsonl", lines)


def _resume(
    model: VisionTransformer, optimizer: torch.optim.Optimizer, card: ModelCard, folder: Path
) -> list[dict[str, float]]:
    """Put model and optimizer where ``last.pt`` left them; return the records until then."""
    path = folder / "last.pt"
    saved, weights, training = read_checkpoint(path)
    if training is None or (saved.name, saved.quant_config, saved.model_args, saved.classes) != (
        card.name,
        card.quant_config,
        card.model_args,
        card.classes,
    ):
        raise CheckpointError(f"{path} is of another model or another run: give the same arguments, or another --out.")
    model.load_state_dict(build(saved, weights, str(path)).state_dict())
    try:
        optimizer.load_state_dict(training["optimizer"])
        history = [dict(record) for record in training["history"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this recipe: {error}.") from error
    return history


def _non_finite(epoch: int, step: int, folder: Path, history: list[dict[str, float]]) -> str:
    kept = f"{folder / 'last.pt'} holds epoch {len(history)}" if history else "no epoch was finished before"
    return (
        f"The loss became NaN or infinite in epoch {epoch + 1}, step {step + 1}; {kept}. "
        "Lower the learning rate (--set quantized.lr=...) and go on with --resume, or start anew."
    )


def _epoch_line(record: Mapping[str, float], epochs: int) -> str:
    unreadable = f"  {record['unreadable']:.0f} unreadable images skipped" if record["unreadable"] else ""
    return (
        f"epoch {record['epoch']:>3.0f}/{epochs}  loss {record['train_loss']:.4f}  train {record['train_top1']:5.2f}  "
        f"val {record['val_top1']:5.2f} (top-5 {record['val_top5']:5.2f})  {record['images_per_second']:.0f} images/s"
        f"{unreadable}"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
