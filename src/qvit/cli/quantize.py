"""The front door: a float model and pictures in, a packed file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.options import (
    Compile,
    Cpu,
    FloatSource,
    Override,
    Pictures,
    Precision,
    ReportFolder,
    Seed,
    SkipCorrupt,
    WeightsName,
    Workers,
    check_bits,
    console,
    options_of,
    parse_overrides,
)
from qvit.errors import ConfigError

MINUTES = 10.0


def quantize(
    source: FloatSource,
    images: Pictures,
    out: Annotated[Path, typer.Option(help="Packed file to write; a checkpoint to train on from lies beside it.")],
    bits: Annotated[int, typer.Option(help="Bits of weights and activations, 2..8.")] = 4,
    activation_bits: Annotated[int | None, typer.Option(help="Bits of activations, if others.")] = None,
    override: Override = None,
    method: Annotated[str, typer.Option(help="reconstruct, or calibrate alone.")] = "reconstruct",
    minutes: Annotated[float | None, typer.Option(help="For the reconstruction [default: 10].", min=0.01)] = None,
    steps: Annotated[int | None, typer.Option(help="Of the reconstruction, instead of --minutes.", min=1)] = None,
    pictures: Annotated[int, typer.Option(help="To work with, at most.", min=1)] = 1024,
    held_out: Annotated[int, typer.Option(help="To measure agreement on, at most.", min=1)] = 256,
    model: WeightsName = None,
    report: ReportFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was stopped.")] = False,
    seed: Seed = 0,
    workers: Workers = None,
    precision: Precision = "no",
    compile_models: Compile = False,
    skip_corrupt: SkipCorrupt = False,
    cpu: Cpu = False,
) -> None:
    """Quantize a float model in minutes, with pictures and without labels.

    Scales are set from the pictures (calibrate); then weights and scales are trained for --minutes to give what the
    float model gives (reconstruct): --compile and, on processors that have it, --precision bf16 make several times as
    many steps of the same minutes. Agreement is measured on pictures that neither saw. Ctrl-C saves where it is.

    Examples:
      qvit quantize deit_small_patch16_224 --images photos --bits 4 --out model.safetensors
      qvit quantize runs/float/best.pt --images photos --bits 2 --minutes 30 --out model.safetensors --report report
    """
    from qvit.config import QuantConfig
    from qvit.study.quantization import Request, run_quantization, summary

    if method not in ("reconstruct", "calibrate"):
        raise ConfigError(f"--method must be reconstruct or calibrate, not {method!r}.")
    if method == "calibrate" and (minutes is not None or steps is not None):
        raise ConfigError("--method calibrate has no budget: leave out --minutes and --steps.")
    if resume and method == "calibrate":
        raise ConfigError("--method calibrate takes seconds and leaves nothing to go on with: leave out --resume.")
    if minutes is not None and steps is not None:
        raise ConfigError("Give either --minutes or --steps.")
    options = options_of(out, seed, workers, precision, compile_models, skip_corrupt, resume, cpu, images)
    request = Request(
        source,
        Path(images),
        QuantConfig(*check_bits(bits, activation_bits), rectifier=None, overrides=parse_overrides(override)),
        "calibrate" if method == "calibrate" else "reconstruct",
        model,
        MINUTES if minutes is None and steps is None else minutes,
        steps,
        pictures,
        held_out,
        report,
    )
    result = run_quantization(request, options, console())
    for part in summary(result, out):
        console().print(part, soft_wrap=isinstance(part, str))
