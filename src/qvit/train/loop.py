"""The training loop and the evaluation, read from top to bottom."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
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
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from qvit.errors import NonFiniteLossError, TrainingStopped
from qvit.files import write_text
from qvit.nn.quantizer import Float32Module
from qvit.train.checkpoint import ModelCard
from qvit.train.data import Batches, readable
from qvit.train.distributed import gradient_norm, is_sharded, scale_gradients, shard, spread, sum_over_processes
from qvit.train.measure import Part, means, together
from qvit.train.nonfinite import first_non_finite
from qvit.train.order import Share, TrainOrder
from qvit.train.oscillation import Oscillation
from qvit.train.preemption import Sigterm
from qvit.train.recipe import Schedule
from qvit.train.run import TEN_MINUTES, Run, SaveEvery, non_finite_message, read_last, tidy


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
    """How a run is carried out, beside its recipe; the same recipe gives the same training whatever stands here.

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


def make_accelerator(options: Options) -> Accelerator:
    """Return the processes, device, precision and accumulation of a run.

    Under ``torchrun`` or ``accelerate launch`` it joins the other processes.
    """
    # Accelerate keeps the first precision for the life of the process; runs that follow one another may differ.
    AcceleratorState._reset_state()
    # Only where it is told to use the CPU does it know of the other processes there.
    cpu = options.cpu or not torch.accelerator.is_available()
    return Accelerator(mixed_precision=options.precision, cpu=cpu, gradient_accumulation_steps=options.accumulate)


def share_of(accelerator: Accelerator) -> Share:
    """Return which part of the images this process takes."""
    return Share(accelerator.process_index, accelerator.num_processes)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Batches,
    device: torch.device,
    *,
    skip_corrupt: bool = False,
    sigterm: Sigterm | None = None,
) -> Accuracy:
    """Return the accuracy of ``model`` over all images of ``loader``, those of the other processes included.

    Processes that share the images (:class:`qvit.train.order.EvaluationOrder`) count each of them once.

    Raises:
        CorruptImageError: naming the first image that cannot be read, unless ``skip_corrupt``.
        TrainingStopped: in all processes, if ``sigterm`` was received in one.
    """
    was_training = model.training
    model.eval()
    first = fifth = images = unreadable = 0
    start = time.perf_counter()
    for batch in readable(loader, skip_corrupt=skip_corrupt):
        if sigterm is not None and sigterm.received:
            break
        unreadable += len(batch.unreadable)
        if len(batch.labels) == 0:
            continue
        logits = model(batch.images.to(device, non_blocking=True))
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == batch.labels.to(device)[:, None]
        first += int(ranked[:, 0].sum())
        fifth += int(ranked.any(dim=1).sum())
        images += len(batch.labels)
    model.train(was_training)
    counts = [first, fifth, images, unreadable, sigterm is not None and sigterm.received]
    first, fifth, images, unreadable, stopped = map(int, sum_over_processes(counts, device))
    if stopped:
        raise TrainingStopped("Stopped in the middle of an evaluation.")
    share = 100.0 / max(images, 1)
    return Accuracy(first * share, fifth * share, images, unreadable, time.perf_counter() - start)


def fit(
    model: VisionTransformer,
    loss_fn: Loss,
    train: Batches,
    val: Batches,
    schedule: Schedule,
    card: ModelCard,
    options: Options,
    console: Console,
) -> tuple[VisionTransformer, list[dict[str, float]]]:
    """Train ``model``; return it with the weights last evaluated, and a record an epoch, as ``metrics.jsonl`` has them.

    A run that was killed goes on from ``last.pt`` as it would have without that: what an epoch shows is a function of
    the seed (see :mod:`qvit.train.order`), and everything else is in the checkpoint (see :mod:`qvit.train.run`).

    Args:
        model: a float model, or a calibrated quantized one; it is trained in place.
        loss_fn: see :class:`Loss`.
        train: this process's share of the training batches, from :func:`qvit.train.methods.training_batches`.
        val: this process's share of the validation batches, evaluated after each epoch.
        schedule: budget and optimizer.
        card: what goes into the checkpoints.
        options: folder, seed, precision, ....
        console: where progress is shown.

    Raises:
        NonFiniteLossError: at the first NaN or infinity, naming the layer; the last good checkpoint is kept.
        TrainingStopped: after SIGTERM, once everything is saved.
        CorruptImageError: see :func:`qvit.train.data.readable`.
        CheckpointError: if ``resume`` finds no checkpoint that fits.
        OutputError: if a file cannot be written; what was there before is kept.
    """
    # What trains: the model, its average, its optimizer, spread over the processes.
    accelerator = make_accelerator(options)
    device, is_main = accelerator.device, accelerator.is_main_process
    console = console if is_main else Console(quiet=True)
    saved = read_last(options.out, card, console) if options.resume else None
    if saved is not None:
        model.load_state_dict(saved.training["trained"] or saved.weights)
    model.to(device)
    if isinstance(loss_fn, nn.Module):
        loss_fn.to(device)
    ema = ModelEmaV3(model, schedule.ema_decay, foreach=not options.fsdp) if schedule.ema_decay else None
    if ema is not None and saved is not None:
        ema.module.load_state_dict(saved.weights)
    evaluated: VisionTransformer = model if ema is None else ema.module
    if options.compile:
        # Of an earlier run in this process nothing is left: its code has no hooks for this run's guidance, and a class
        # is compiled for a limited number of different models.
        torch.compiler.reset()
        for part in (model, getattr(loss_fn, "teacher", None)):
            if part is not None:
                part.compile()
    if options.fsdp and accelerator.num_processes > 1:
        evaluated = copy.deepcopy(evaluated)  # a whole model, for evaluation alone
        if ema is not None:
            shard(ema.module)
    student = spread(model, accelerator, fsdp=options.fsdp)
    optimizer, clip = make_optimizer(model, schedule)

    # Where it stands: from the start, or from a checkpoint.
    order = train.batch_sampler
    assert isinstance(order, TrainOrder)
    steps = order.steps
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs * steps,
        warmup_t=round(schedule.warmup_epochs * steps),
        warmup_lr_init=0.0,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    oscillation = Oscillation(model, schedule.freeze_oscillating) if card.quant_config is not None else None
    run = Run(options.out, card, student, optimizer, order, accelerator, oscillation, ema)
    set_seed(options.seed * 100_003 + accelerator.process_index)
    if saved is not None:
        run.restore(saved)
        card.metrics = _metrics(run.progress.history[-1]) if run.progress.history else {}
        scheduler.step_update(run.progress.epoch * steps + run.progress.step)
        console.print(f"Going on from {saved.path.name}: {run.progress}.", highlight=False)
    progress, history = run.progress, run.progress.history
    accelerator.wait_for_everyone()  # until all have read the checkpoint
    if is_main:
        if saved is not None:
            tidy(options.out, saved)
        _write_metrics(options.out, history)

    with Sigterm() as sigterm, _board(options.out, len(history), is_main) as board, _progress(console) as bar:
        done = progress.epoch * steps + progress.step
        task = bar.add_task("", total=schedule.epochs * steps, completed=done)
        for epoch in range(progress.epoch, schedule.epochs):
            order.begin(epoch, progress.step)
            model.train()
            start, seconds_before = time.perf_counter(), progress.seconds
            parts: list[Part] = []
            for batch in readable(train, skip_corrupt=options.skip_corrupt):
                loss_fn.progress = (epoch * steps + progress.step) / (schedule.epochs * steps)
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
                step = together(parts, device, stop=sigterm.received, save=run.is_due(options.save_every))
                norm = gradient_norm(model)
                finite = math.isfinite(step.sums["train_loss"])
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
                progress.images += step.images
                progress.unreadable += step.unreadable
                progress.seconds = seconds_before + time.perf_counter() - start
                for name, value in step.sums.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
                scheduler.step_update(epoch * steps + progress.step)
                if step.save or step.stop:
                    run.save()
                if step.stop:
                    raise TrainingStopped(_stopped(run))
                bar.update(task, advance=1, description=_step_line(run, schedule.epochs))

            if options.fsdp and accelerator.num_processes > 1:
                evaluated.load_state_dict(run.weights())
            try:
                accuracy = evaluate(evaluated, val, device, skip_corrupt=options.skip_corrupt, sigterm=sigterm)
            except TrainingStopped:
                run.save()
                raise TrainingStopped(_stopped(run)) from None
            record = {
                "epoch": epoch + 1,
                **{name: total / progress.images for name, total in progress.sums.items()},
                "val_top1": accuracy.top1,
                "val_top5": accuracy.top5,
                "val_images": accuracy.images,
                "unreadable": progress.unreadable + accuracy.unreadable,
                "lr": optimizer.param_groups[0]["lr"],
                **(oscillation.shares() if oscillation is not None else {}),
                "images_per_second": progress.images / progress.seconds,
                "seconds": progress.seconds + accuracy.seconds,
            }
            best = accuracy.top1 > max((record["val_top1"] for record in history), default=-math.inf)
            card.metrics = _metrics(record)
            progress.next_epoch(record)
            run.save(best=best)
            if board is not None:
                for name, scalar in record.items():
                    board.add_scalar(name, scalar, epoch + 1)
                _write_metrics(options.out, history)
                bar.console.print(_epoch_line(record, schedule.epochs), highlight=False)
            if sum_over_processes([sigterm.received], device)[0]:
                raise TrainingStopped(_stopped(run))
    model._compiled_call_impl = None  # what is measured of it next needs hooks, which compiled code does not call
    return evaluated, history


def make_optimizer(model: VisionTransformer, schedule: Schedule) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer of a model, sharded or not, and the norm to which its gradients have to be clipped."""
    arguments, clip = dict(schedule.optimizer_args), schedule.clip_grad
    if is_sharded(model) and schedule.optimizer == "lamb":
        # timm's LAMB clips by itself, to 1 unless told otherwise, but not where some gradients are sharded.
        own = arguments.pop("max_grad_norm", 1.0)
        arguments["max_grad_norm"] = None
        clip = min(clip or math.inf, own or math.inf)
    optimizer = create_optimizer_v2(
        parameter_groups(model, schedule),
        opt=schedule.optimizer,
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        **arguments,
    )
    return optimizer, clip


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


def _metrics(record: Mapping[str, float]) -> dict[str, float]:
    return {name: record[name] for name in ("val_top1", "val_top5", "val_images")}


def _again(accelerator: Accelerator, loss_fn: Loss, student: nn.Module, parts: list[Part]) -> None:
    with accelerator.autocast():
        for part in parts:
            loss_fn(student, part.images, part.labels)


def _stopped(run: Run) -> str:
    return f"Stopped by SIGTERM at {run.progress}; {run.folder / 'last.pt'} is saved, and a resumed run goes on there."


def _step_line(run: Run, epochs: int) -> str:
    progress = run.progress
    loss, top1 = (progress.sums[name] / progress.images for name in ("train_loss", "train_top1"))
    rate = progress.images / progress.seconds
    return f"epoch {progress.epoch + 1}/{epochs}  loss {loss:.3f}  top-1 {top1:.1f}  {rate:.0f} images/s"


def _epoch_line(record: Mapping[str, float], epochs: int) -> str:
    unreadable = f"  {record['unreadable']:.0f} unreadable images skipped" if record["unreadable"] else ""
    return (
        f"epoch {record['epoch']:>3.0f}/{epochs}  loss {record['train_loss']:.4f}  train {record['train_top1']:5.2f}  "
        f"val {record['val_top1']:5.2f} (top-5 {record['val_top5']:5.2f})  {record['images_per_second']:.0f} images/s"
        f"{unreadable}"
    )


def _board(folder: Path, epochs: int, is_main: bool) -> contextlib.AbstractContextManager[SummaryWriter | None]:
    if not is_main:
        return contextlib.nullcontext()
    board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=epochs)
    return board


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
