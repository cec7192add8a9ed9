"""Commands that say what models cost and which of two is better: complexity, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.options import (
    Cpu,
    DataRoot,
    Override,
    SkipCorrupt,
    Splits,
    Workers,
    check_bits,
    console,
    options_of,
    parse_overrides,
)
from qvit.errors import ConfigError
from qvit.files import all_or_none, check_new, printable
from qvit.runtime.processors import MOST_THREADS


def complexity(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="timm's name of a model, a checkpoint (.pt) or a packed file."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Of a float model, 2..8 [default: 4].")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="Bits of activations, if others.")] = None,
    override: Override = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side, of a model by name [default: the model's].", min=1)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time it too, with random codes, beside the float model in PyTorch.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's models in one table: DeiT and Swin, T/S/B.")
    ] = False,
) -> None:
    """Print what a quantized model costs before it is trained: parameters, bytes, multiply-adds, time of an image.

    Parameters, bytes and multiply-adds are exact. The time is predicted from a short measurement on this machine.

    Examples:
      qvit complexity deit_small_patch16_224 --bits 4 --measure
      qvit complexity --paper --bits 3
    """
    from qvit.analysis.complexity import complexity as count
    from qvit.config import QuantConfig
    from qvit.study.complexity import PAPER_MODELS, costs_of, model_tables, models_tables

    if paper == (model is not None):
        raise ConfigError("Give a model, or --paper for all of the paper's.")
    config = None
    if bits is not None or activation_bits is not None or override is not None:
        widths = check_bits(4 if bits is None else bits, activation_bits)
        config = QuantConfig(*widths, rectifier=None, overrides=parse_overrides(override))
    names = PAPER_MODELS if model is None else {model: model}
    counted = {name: count(source, config, image_size) for name, source in names.items()}
    costs = costs_of(counted, measure=measure, report=lambda message: console().print(printable(message), style="dim"))
    tables = models_tables(costs) if model is None else model_tables(model, costs[model])
    for part in tables:
        console().print(part, soft_wrap=isinstance(part, str))


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint (.pt) or a packed file (.safetensors).")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, with the same classes.")],
    data: Annotated[
        str | None, typer.Option(help="Labelled images, as of qvit eval: digits, a folder, a timm data set.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Or a folder of pictures without labels: agreement of A and B alone.")
    ] = None,
    data_root: DataRoot = None,
    splits: Splits = "train,validation",
    batch_size: Annotated[int, typer.Option(help="Images per step.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Of either model while it is timed.", min=1, max=MOST_THREADS)] = 1,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.html, with images on which they differ, and report.json.")
    ] = None,
    workers: Workers = None,
    skip_corrupt: SkipCorrupt = False,
    cpu: Cpu = False,
) -> None:
    """Compare two models on the same images: accuracy with a paired test, agreement, size, time of an image.

    Each takes the images by its own preprocessing. McNemar's exact test says whether a difference may be chance.

    Examples:
      qvit compare runs/float/best.pt model.safetensors --data imagenet --report report
      qvit compare four.safetensors two.safetensors --images photos
    """
    from qvit.study.comparison import Request, run_comparison
    from qvit.study.comparison_report import comparison_table, pages, sentences, write_comparison_report

    pictures = None if images is None else Path(images)
    request = Request(first, second, data, pictures, data_root, splits, batch_size, threads)
    options = options_of(Path(), 0, workers, "no", False, skip_corrupt, False, cpu, data or str(images))
    if report is not None:
        check_new(pages(report))
    comparison = run_comparison(request, options, console())
    console().print(comparison_table(comparison))
    for sentence in sentences(comparison):
        console().print(printable(sentence), soft_wrap=True)
    if report is not None:
        with all_or_none(pages(report)):
            page = write_comparison_report(report, comparison)
        console().print(printable(f"Report: {page}"), soft_wrap=True)
