"""Outlier channels: the same float function with one channel of every norm much larger, and how it is quantized.

In every norm before layers one channel is multiplied by a factor, and the columns of the weights behind it divided by
that. The quantized models are calibrated, not trained; "not balanced" leaves out what docs/method.md, section 10 says.

Example: python benchmarks/outliers.py teacher.pt cifar10
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.agreement import agreement
from qvit.data.loader import make_loader, make_transform
from qvit.data.pictures import open_pictures
from qvit.models.checkpoint import load_checkpoint
from qvit.quantization import balance

FACTORS = (1, 10, 100, 1000)


def main() -> None:
    """Print a table of agreement with the float model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="float checkpoint")
    parser.add_argument("images", type=Path, help="folder of pictures, at any depth")
    parser.add_argument("--calibration", type=int, default=512, help="pictures that set the scales")
    parser.add_argument("--held-out", type=int, default=2000, help="pictures that agreement is measured on")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher, spec = load_checkpoint(arguments.teacher)
    pictures = open_pictures(
        arguments.images, spec.mode, count=arguments.calibration, held_out=arguments.held_out, seed=0
    )
    images, held_out = (
        torch.cat([batch.images for batch in make_loader(part, make_transform(spec.preprocessing), 256, shuffle=False)])
        for part in (pictures.used, pictures.held_out)
    )
    table = Table(title=f"{spec.name}: same class as the float model (%), {len(held_out)} pictures, calibrated alone")
    for column in ("bits", "one channel times", "balanced", "not balanced"):
        table.add_column(column, justify="right")
    for bits in (8, 4):
        for factor in FACTORS:
            model = with_outliers(teacher, images[:64], factor)
            agreements = []
            for outlier in (balance.OUTLIER, float("inf")):
                with mock.patch.object(balance, "OUTLIER", outlier):
                    student = quantize(model, QuantConfig(bits, bits, rectifier=None))
                    calibrate(student, images.split(128))
                agreements.append(agreement(student, teacher, held_out.split(256)).same_class)
            table.add_row(str(bits), str(factor), *(f"{agreement:.2f}" for agreement in agreements))
            print(bits, factor, *agreements, flush=True)
    Console(width=100).print(table)


def feeds_of(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return norms of a float model, and the layers that each of them feeds and that are balanced with it."""
    student = quantize(model)
    names = {module: name for name, module in student.named_modules()}
    return [
        (model.get_submodule(names[norm]), [model.get_submodule(names[layer]) for layer in layers])
        for norm, layers in balance.fed_layers(student)
    ]


@torch.no_grad()
def with_outliers(model: nn.Module, images: Tensor, factor: float) -> nn.Module:
    """Return the same function; in every norm before layers the channel of median size is ``factor`` times as large."""
    other = copy.deepcopy(model)
    for norm, layers in feeds_of(other):
        seen: list[Tensor] = []
        hook = norm.register_forward_hook(lambda module, args, x, seen=seen: seen.append(x))
        other(images)
        hook.remove()
        deviation = seen[0].flatten(0, -2).std(dim=0)
        channel = int((deviation - deviation.median()).abs().argmin())
        for parameter in norm.parameters():
            parameter[channel] *= factor
        for layer in layers:
            layer.get_parameter("weight")[:, channel] /= factor
    return other


if __name__ == "__main__":
    main()
