"""Commands that say what models cost and which of two is better: complexity, compare."""

from __future__ import annotations

from typing import Annotated

import typer

from qvit.cli.options import (
    Override,
    check_bits,
    console,
    parse_overrides,
)
from qvit.errors import ConfigError
from qvit.files import printable


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
        config = QuantConfig(*widths, rectify=None, overrides=parse_overrides(override))
    names = PAPER_MODELS if model is None else {model: model}
    counted = {name: count(source, config, image_size) for name, source in names.items()}
    costs = costs_of(counted, measure=measure, report=lambda message: console().print(printable(message), style="dim"))
    tables = models_tables(costs) if model is None else model_tables(model, costs[model])
    for part in tables:
        console().print(part, soft_wrap=isinstance(part, str))
