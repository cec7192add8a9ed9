"""The training loop and the evaluation, read from top to bottom."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from timm.models import VisionTransformer
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from qvit.data.loader import Batches, readable
from qvit.data.order import TrainOrder
from qvit.data.resident import ResidentLoader
from qvit.errors import NonFiniteLossError, TrainingStopped
from qvit.files import write_text
from qvit.models.spec import ModelSpec
from qvit.nn.modes import compiled
from qvit.train.display import epoch_line, progress_bar, step_line, tensorboard
from qvit.train.distributed import gradient_norm, scale_gradients, shard, spread, sum_over_processes
from qvit.train.evaluate import evaluate
from qvit.train.measure import Part, means, together
from qvit.train.nonfinite import first_non_finite
from qvit.train.optim import make_optimizer
from qvit.train.options import Options, make_accelerator
from qvit.train.oscillation import Oscillation
from qvit.train.preemption import Sigterm
from qvit.train.recipe import Hyperparameters
from qvit.train.run import METRICS, Run, non_finite_message, read_last, says_what_is_kept, stopped_message, tidy
from qvit.train.settings import settings_of


class Loss(Protocol):
    """What the loop trains with: :class:`qvit.DistillationLoss` or :class:`LabelLoss`."""

    last_parts: dict[str, Tensor]
    progress: float
    """Share of the training that is done, which the loop sets."""

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss."""


class LabelLoss(nn.Module):
    """Cross-entropy against the labels, for a float model or for quantization-aware training without a teacher."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing, self.progress = label_smoothing, 0.0
        self.last_parts: dict[str, Tensor] = {}

    def forward(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``student`` on ``images (B, C, H, W)`` with class numbers ``labels (B,)``."""
        logits = student(images)
        self.last_parts = {"logits": logits.detach()}
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


def fit(
    model: VisionTransformer,
    loss_fn: Loss,
    train: Batches,
    val: Batches,
    hyperparameters: Hyperparameters,
    spec: ModelSpec,
    options: Options,
    console: Console,
) -> tuple[VisionTransformer, list[dict[str, float]]]:
    """Train ``model``; return it with the weights last evaluated, and a record per epoch, as in ``metrics.jsonl``.

    A run that was killed goes on from ``last.pt`` as it would have without that: what an epoch shows is a function of
    the seed (see :mod:`qvit.data.order`), and everything else is in the checkpoint (see :mod:`qvit.train.run`).

    Args:
        model: a float model, or a calibrated quantized one; it is trained in place.
        loss_fn: see :class:`Loss`.
        train: this process's share of the training batches, from :func:`qvit.train.batches.training_batches`.
        val: this process's share of the validation batches, evaluated after each epoch.
        hyperparameters: of the recipe.
        spec: what goes into the checkpoints.
        options: folder, seed, precision, ....
        console: where progress is shown.

    Raises:
        NonFiniteLossError: at the first NaN or infinity, naming the layer; the last good checkpoint is kept.
        TrainingStopped: after SIGTERM, once everything is saved.
        KeyboardInterrupt: after Ctrl-C, saying what is saved.
        CorruptImageError: see :func:`qvit.data.sources.readable`.
        CheckpointError: if ``resume`` finds no checkpoint that fits.
        OutputError: if a file cannot be written; what was there before is kept.
    """
    # What trains: the model, its average, its optimizer, spread over the processes.
    accelerator = make_accelerator(options)
    device, is_main = accelerator.device, accelerator.is_main_process
    console = console if is_main else Console(quiet=True)
    order, teacher = train.batch_sampler, getattr(loss_fn, "teacher", None)
    assert isinstance(order, TrainOrder)
    settings = settings_of(hyperparameters, spec, options, order, teacher, resident=isinstance(train, ResidentLoader))
    saved = read_last(options.out, spec, settings, console) if options.resume else None
    if saved is not None:
        model.load_state_dict(saved.training["trained"] or saved.weights)
    model.to(device)
    if isinstance(loss_fn, nn.Module):
        loss_fn.to(device)
    ema = ModelEmaV3(model, hyperparameters.ema_decay, foreach=not options.fsdp) if hyperparameters.ema_decay else None
    if ema is not None and saved is not None:
        ema.module.load_state_dict(saved.weights)
    evaluated: VisionTransformer = model if ema is None else ema.module
    if options.fsdp and accelerator.num_processes > 1:
        evaluated = copy.deepcopy(evaluated)  # a whole model, for evaluation alone
        if ema is not None:
            shard(ema.module)
    student = spread(model, accelerator, fsdp=options.fsdp)
    optimizer, clip = make_optimizer(model, hyperparameters)

    # Where it stands: from the start, or from a checkpoint.
    steps = order.steps
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=hyperparameters.epochs * steps,
        warmup_t=round(hyperparameters.warmup_epochs * steps),
        warmup_lr_init=0.0,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    tracked = hyperparameters.track_oscillation or hyperparameters.freeze_oscillating > 0
    oscillation = Oscillation(model, hyperparameters.freeze_oscillating) if tracked and spec.quant_config else None
    run = Run(options.out, spec, student, optimizer, order, settings, accelerator, oscillation, ema)
    set_seed(options.seed * 100_003 + accelerator.process_index)
    if saved is not None:
        run.restore(saved)
        spec.metrics = _metrics(run.progress.history[-1]) if run.progress.history else {}
        scheduler.step_update(run.progress.epoch * steps + run.progress.step)
        console.print(f"Going on from {saved.path.name}: {run.progress}.", highlight=False)
    progress, history = run.progress, run.progress.history
    accelerator.wait_for_everyone()  # until all have read the checkpoint
    if is_main and saved is not None:
        tidy(options.out, saved)
        _write_metrics(options.out, history)

    with (
        compiled(*(part for part in (model, teacher) if part is not None), wanted=options.compile),
        says_what_is_kept(run),
        Sigterm() as sigterm,
        tensorboard(options.out, len(history), is_main) as board,
        progress_bar(console) as bar,
    ):
        done = progress.epoch * steps + progress.step
        task = bar.add_task("", total=hyperparameters.epochs * steps, completed=done)
        for epoch in range(progress.epoch, hyperparameters.epochs):
            order.begin(epoch, progress.step)
            model.train()
            start, seconds_before = time.perf_counter(), progress.seconds
            parts: list[Part] = []
            for batch in readable(train, skip_corrupt=options.skip_corrupt):
                loss_fn.progress = (epoch * steps + progress.step) / (hyperparameters.epochs * steps)
                with accelerator.accumulate(student):
                    images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
                    with accelerator.autocast():
                        loss = loss_fn(student, images, labels)
                    accelerator.backward(loss)
                measured = means(loss, loss_fn.last_parts, labels)
                parts.append(Part(images, labels, len(batch.unreadable), measured))
                if not accelerator.sync_gradients:
                    continue

                # All parts of the batch are done, in this process and in the others.
                totals = together(parts, device, stop=sigterm.received, save=run.is_due(options.save_every))
                norm = gradient_norm(model)
                finite = math.isfinite(totals.sums["train_loss"])
                if not (finite and math.isfinite(norm)):
                    again = partial(_again, accelerator, loss_fn, student, parts)
                    where = first_non_finite(model, again, loss_was_finite=finite)
                    raise NonFiniteLossError(non_finite_message(run, where))
                if 0 < clip < norm:
                    scale_gradients(model, clip / norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if oscillation is not None:
                    oscillation.update()
                if ema is not None:
                    ema.update(model)
                parts = []

                progress.step += 1
                progress.images += totals.images
                progress.unreadable += totals.unreadable
                progress.seconds = seconds_before + time.perf_counter() - start
                for name, value in totals.sums.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
                scheduler.step_update(epoch * steps + progress.step)
                if totals.save or totals.stop:
                    run.save()
                if totals.stop:
                    raise TrainingStopped(stopped_message(run))
                bar.update(task, advance=1, description=step_line(run, hyperparameters.epochs))

            if options.fsdp and accelerator.num_processes > 1:
                evaluated.load_state_dict(run.weights())
            try:
                accuracy = evaluate(evaluated, val, device, skip_corrupt=options.skip_corrupt, sigterm=sigterm)
            except TrainingStopped:
                run.save()
                raise TrainingStopped(stopped_message(run)) from None
            record = {
                "epoch": epoch + 1,
                **{name: total / progress.images for name, total in progress.sums.items()},
                "val_top1": accuracy.top1,
                "val_top5": accuracy.top5,
                "val_images": accuracy.images,
                "unreadable": progress.unreadable + accuracy.unreadable,
                "lr": optimizer.param_groups[0]["lr"],
                **(oscillation.percentages() if oscillation is not None else {}),
                "images_per_second": progress.images / progress.seconds,
                "seconds": progress.seconds + accuracy.seconds,
            }
            best = accuracy.top1 > max((record["val_top1"] for record in history), default=-math.inf)
            spec.metrics = _metrics(record)
            progress.next_epoch(record)
            run.save(best=best)
            if board is not None:
                for name, scalar in record.items():
                    board.add_scalar(name, scalar, epoch + 1)
                _write_metrics(options.out, history)
                bar.console.print(epoch_line(record, hyperparameters.epochs), highlight=False)
            if sum_over_processes([sigterm.received], device)[0] and progress.epoch < hyperparameters.epochs:
                raise TrainingStopped(stopped_message(run))
    return evaluated, history


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the records of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _write_metrics(folder: Path, history: Iterable[Mapping[str, float]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in history)
    write_text(folder / METRICS, lines)


def _metrics(record: Mapping[str, float]) -> dict[str, float]:
    return {name: record[name] for name in ("val_top1", "val_top5", "val_images")}


def _again(accelerator: Accelerator, loss_fn: Loss, student: nn.Module, parts: list[Part]) -> None:
    with accelerator.autocast():
        for part in parts:
            loss_fn(student, part.images, part.labels)
