"""From a float model and pictures without labels to a packed file, a checkpoint and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor, nn

from qvit.analysis.agreement import Agreement, agreement
from qvit.config import QuantConfig
from qvit.data.pictures import open_pictures
from qvit.errors import CheckpointError, NonFiniteLossError, OutputError
from qvit.exporting.packed import export, origin_of
from qvit.files import all_or_none, printable, write_text
from qvit.models.checkpoint import check_weights, read_checkpoint, weights_checksum, write_checkpoint
from qvit.models.spec import ModelSpec
from qvit.quantization.calibrate import calibrate
from qvit.quantization.convert import quantize
from qvit.quantization.reconstruct import Progress, Reconstruction, Settings
from qvit.study.inputs import BATCH, decoded, float_model, timed_task
from qvit.study.quantization_report import write_quantization_report
from qvit.study.targets import Targets
from qvit.train.display import progress_bar
from qvit.train.options import Options, make_accelerator
from qvit.train.preemption import Interrupts

Method = Literal["reconstruct", "calibrate"]
CALIBRATION_PICTURES = 512
_METHODS = {
    "calibrated": "calibration, without labels",
    "reconstructed": "calibration and reconstruction, without labels",
}
"""What is written of a model's making, by which of the two is kept."""
_SAVE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be quantized, and how.

    Args:
        source: the float model: what :func:`qvit.models.float_models.load_float` takes.
        images: folder of pictures.
        config: bits of the model.
        method: ``"calibrate"`` sets the scales alone; ``"reconstruct"`` then trains on the float model's outputs.
        model: timm's name, for a source that is a file of weights alone.
        minutes: for the reconstruction, unless ``steps`` are given.
        steps: of the reconstruction.
        pictures: to work with, at most.
        held_out: pictures to measure agreement on, at most.
        report: folder of ``report.html`` and ``report.json``; ``None`` for none.
    """

    source: str
    images: Path
    config: QuantConfig
    method: Method = "reconstruct"
    model: str | None = None
    minutes: float | None = None
    steps: int | None = None
    pictures: int = 1024
    held_out: int = 256
    report: Path | None = None


Result = dict[str, Any]
"""What ``report.json`` holds."""


def run_quantization(request: Request, options: Options, console: Console) -> Result:
    """Quantize a model on pictures and write it; ``options.out`` is the packed file, and the checkpoint lies beside it.

    Raises:
        ConfigError: for an output that is there already or cannot be meant, or an override that matches no layer.
        QvitError: as the functions that it calls.
        KeyboardInterrupt: after Ctrl-C; what was done until then is written, and ``options.resume`` goes on there.
        TrainingStopped: after SIGTERM, likewise.
    """
    began = time.perf_counter()
    targets = Targets.of(options.out, request.report)
    with targets.alone(make_accelerator(options)):
        targets.begin(resume=options.resume)
        result = _quantized(request, options, console, targets, began)
        if request.report is not None:
            with all_or_none([targets.page, targets.record]):
                write_quantization_report(targets.page, result)
                write_text(targets.record, json.dumps(result, indent=1))
    return result


def _quantized(request: Request, options: Options, console: Console, targets: Targets, began: float) -> Result:
    teacher, spec = float_model(request.source, request.model, console)
    device = make_accelerator(options).device
    student = quantize(teacher, request.config)
    spec = dataclasses.replace(spec, quant_config=request.config.to_dict(), metrics={}, recipe={})
    spec.method = _METHODS["calibrated"]
    chosen = open_pictures(
        request.images, spec.mode, count=request.pictures, held_out=request.held_out, seed=options.seed
    )
    if chosen.remark:
        console.print(printable(chosen.remark), soft_wrap=True)
    told: dict[str, Any] = {"kept": "calibrated"}
    with progress_bar(console) as bar:
        used, held_out = (
            decoded(images, spec, options, bar, title)
            for images, title in ((chosen.used, "pictures"), (chosen.held_out, "pictures held out"))
        )
        apart = bool(used and held_out) and chosen.held_out.sources != chosen.used.sources
        used, held_out = used or held_out, held_out or used[:1]
        teacher, student = teacher.to(device).requires_grad_(False), student.to(device)
        with timed_task(bar, "calibration") as task:
            calibrate(
                student,
                _first(used, CALIBRATION_PICTURES),
                report=lambda done, total: bar.update(task, completed=done, total=total),
            )
        with timed_task(bar, "agreement"):
            measured = {"calibrated": agreement(student, teacher, held_out)}
        if request.method == "reconstruct":
            before = {name: value.cpu().clone() for name, value in student.state_dict().items()}
            identity = _identity(teacher, spec, used, held_out)
            try:
                reached = _reconstruct(student, teacher, used, identity, request, options, spec, targets.partial, bar)
                told |= {"steps": reached.step, "reconstruction_seconds": reached.seconds, "loss": reached.loss}
                told["on_time"] = reached.on_time
                with timed_task(bar, "agreement"):
                    measured["reconstructed"] = agreement(student, teacher, held_out)
                if not _is_worse(measured["reconstructed"], measured["calibrated"]):
                    told["kept"] = "reconstructed"
            except NonFiniteLossError as error:
                bar.console.print(printable(str(error)), soft_wrap=True)
            if told["kept"] == "calibrated":
                student.load_state_dict(before)
    student = student.cpu().eval()
    kept = measured[told["kept"]]
    spec.method, spec.metrics = _METHODS[told["kept"]], _metrics(kept)
    targets.check()  # something may have come there meanwhile
    with all_or_none([targets.checkpoint, targets.packed]):
        write_checkpoint(targets.checkpoint, spec, student)
        export(student, targets.packed, preprocessing=spec.preprocessing, classes=spec.classes, origin=origin_of(spec))
    targets.partial.unlink(missing_ok=True)
    return Result(
        source=request.source,
        model=spec.name,
        bits=[request.config.weight_bits, request.config.activation_bits],
        overrides=request.config.to_dict()["overrides"],
        method=request.method,
        seed=options.seed,
        pictures=sum(map(len, used)),
        held_out=kept.images,
        apart=apart,
        agreement={name: dataclasses.asdict(result) for name, result in measured.items()},
        bytes=targets.packed.stat().st_size,
        float_bytes=4 * sum(parameter.numel() for parameter in teacher.parameters()),
        checksum=weights_checksum(student),
        seconds=time.perf_counter() - began,
        **told,
    )


def summary(result: Result, out: Path) -> list[Any]:
    """Return what the command prints of a result: a table and sentences."""
    table = Table(title=printable(f"{result['model']}, {_bits(result)}, {result['held_out']} pictures"))
    classifies = next(iter(result["agreement"].values()))["same_class"] is not None
    table.add_column("")
    table.add_column("same class as float (%)" if classifies else "cosine with float", justify="right")
    for name, measured in result["agreement"].items():
        table.add_row(name, f"{measured['same_class']:.1f}" if classifies else f"{measured['cosine']:.4f}")
    lines: list[Any] = [table]
    if not result["apart"]:
        lines.append("The folder has one picture: nothing could be held out, and these figures are of that picture.")
    if result["kept"] == "calibrated" and "reconstructed" in result["agreement"]:
        lines.append(
            "Reconstruction made it worse on the pictures held out, so the calibrated model was kept: give more "
            "--minutes or more pictures."
        )
    ratio = result["float_bytes"] / result["bytes"]
    again = " (--steps {steps} makes the same again)" if result.get("on_time") else ""
    steps = f", {result['steps']} steps{again.format(**result)}" if "steps" in result else ""
    lines.append(
        printable(
            f"{out}: {result['bytes'] / 1e6:.2f} MB, {ratio:.1f} times smaller than float32; {out.with_suffix('.pt')} "
            f"to train on from (qvit train --initial-model; with --method baseline or distill its scales count); "
            f"{result['seconds'] / 60:.1f} minutes{steps}."
        )
    )
    return lines


def _first(batches: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    return batches[: -(-count // BATCH)]


def _reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    used: Sequence[Tensor],
    identity: dict[str, str],
    request: Request,
    options: Options,
    spec: ModelSpec,
    partial: Path,
    bar: Bar,
) -> Progress:
    """Reconstruct, or go on with it, and leave an unfinished one in a file; what is written then can be used."""
    settings = Settings(
        steps=request.steps,
        minutes=request.minutes,
        seed=options.seed,
        precision=options.precision,
        compile=options.compile,
    )
    run = Reconstruction(student, teacher, used, settings)
    command = {**identity, **dataclasses.asdict(settings)}
    if options.resume:
        _restore(run, spec, command, partial)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        saved = time.monotonic()
        write_checkpoint(partial, spec, student, {"settings": command, "reconstruction": run.state_dict()})

    with Interrupts() as interrupts, timed_task(bar, "reconstruction", 1.0) as task:

        def show(progress: Progress) -> None:
            of = f" of {progress.steps}" if progress.steps is not None else ""
            rate = f"{progress.images_per_second:.0f} images/s"
            text = f"reconstruction, step {progress.step}{of}, loss {progress.loss:.4f}, {rate}"
            bar.update(task, completed=progress.fraction, description=text)
            if progress.fraction == 1 or interrupts.error is not None:
                save()
            if interrupts.error is not None:
                raise interrupts.error(
                    f"Stopped at step {progress.step}; {partial} is saved: the same command with --resume goes on "
                    "there, and qvit export makes a packed file of it as it is."
                )
            if time.monotonic() - saved > _SAVE_SECONDS:
                try:
                    save()
                except OutputError as error:  # there may be room again when it matters
                    bar.console.print(printable(str(error)), soft_wrap=True)

        return run.go_on(show)


def _identity(
    teacher: nn.Module, spec: ModelSpec, used: Sequence[Tensor], held_out: Sequence[Tensor]
) -> dict[str, str]:
    """Return checksums of what a reconstruction learns from and is measured on."""
    described = json.dumps([spec.classes, spec.preprocessing], sort_keys=True)
    identity = {
        "teacher": weights_checksum(teacher),
        "classes and preprocessing": hashlib.sha256(described.encode()).hexdigest(),
    }
    for name, batches in (("pictures", used), ("pictures held out", held_out)):
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(batch.numpy().tobytes())
        identity[name] = digest.hexdigest()
    return identity


def _restore(run: Reconstruction, spec: ModelSpec, command: dict[str, Any], path: Path) -> None:
    """Put a reconstruction where it was saved.

    Raises:
        CheckpointError: if the file is damaged, edited or of another command.
    """
    saved_spec, weights, training = read_checkpoint(path)
    saved = (training or {}).get("settings")
    if (saved_spec.name, saved_spec.model_args, saved_spec.quant_config) != (
        spec.name,
        spec.model_args,
        spec.quant_config,
    ):
        raise CheckpointError(
            f"{path} is of another model or of other bits: give the same arguments, or another --out."
        )
    if saved != command:
        saved = saved if isinstance(saved, dict) else {}
        other = [name for name in command if saved.get(name) != command[name]] or ["other settings"]
        raise CheckpointError(
            f"{path} is of a command that differs in {', '.join(other)}: give the same, or another --out."
        )
    check_weights(saved_spec, weights, path)
    try:
        run.student.load_state_dict(weights)
        run.load_state_dict((training or {})["reconstruction"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} was edited or damaged: it holds no state of a reconstruction.") from error


def _is_worse(first: Agreement, second: Agreement) -> bool:
    if first.same_class is None or second.same_class is None:
        return first.cosine < second.cosine
    return (first.same_class, first.cosine) < (second.same_class, second.cosine)


def _metrics(measured: Agreement) -> dict[str, float]:
    same = {} if measured.same_class is None else {"same_class": measured.same_class}
    return {**same, "cosine": measured.cosine, "pictures": measured.images}


def _bits(result: Result) -> str:
    weights, activations = result["bits"]
    text = f"{weights} bits" if weights == activations else f"{weights} bits, activations {activations}"
    return f"{text}, {len(result['overrides'])} overrides" if result["overrides"] else text
