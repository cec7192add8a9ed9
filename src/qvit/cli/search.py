"""Bits where they pay: a float model, pictures and a budget in, a file of overrides out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.options import (
    Cpu,
    FloatSource,
    Pictures,
    ReportFolder,
    Seed,
    SkipCorrupt,
    WeightsName,
    Workers,
    console,
    options_of,
)


def search_bits(
    source: FloatSource,
    images: Pictures,
    out: Annotated[Path, typer.Option(help="File to write: lines PATTERN=BITS for --override @FILE.")],
    budget_ms: Annotated[float | None, typer.Option(help="Milliseconds of an image in the engine, here.")] = None,
    budget_mb: Annotated[float | None, typer.Option(help="Megabytes (10^6) of the file's codes and scales.")] = None,
    budget_bops: Annotated[
        float | None,
        typer.Option(help="10^9 bit operations of an image: multiply-adds, each times the bits of both its factors."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the engine [default: all processors].", min=1)] = None,
    pictures: Annotated[int, typer.Option(help="To set scales with, at most.", min=1)] = 512,
    held_out: Annotated[int, typer.Option(help="To measure distances on, at most.", min=1)] = 64,
    model: WeightsName = None,
    report: ReportFolder = None,
    seed: Seed = 0,
    workers: Workers = None,
    skip_corrupt: SkipCorrupt = False,
    cpu: Cpu = False,
) -> None:
    """Find the bits of every layer, of weights and activations, that a budget is best spent on.

    Measured are the distance of the outputs from the float model's with each quantizer alone at few bits, and the
    engine's time for each product; a solver then finds the best of all combinations. Several budgets hold together.
    The patch embedding and the heads keep 8 bits. Nothing is written before all is done.

    Examples:
      qvit search-bits deit_small_patch16_224 --images photos --budget-ms 10 --out bits.txt
      qvit search-bits runs/float/best.pt --images photos --budget-mb 8 --budget-bops 40 --out bits.txt --report report
      qvit quantize runs/float/best.pt --images photos --override @bits.txt --out model.safetensors
    """
    from qvit.search.run import Request, run_search, summary

    options = options_of(out, seed, workers, "no", False, skip_corrupt, False, cpu, images)
    given = {"mb": budget_mb, "bops": budget_bops, "ms": budget_ms}
    budgets = {name: limit for name, limit in given.items() if limit is not None}
    request = Request(source, Path(images), budgets, model, pictures, held_out, threads, report)
    found = run_search(request, options, console())
    for part in summary(found, request, options):
        console().print(part, soft_wrap=isinstance(part, str))
