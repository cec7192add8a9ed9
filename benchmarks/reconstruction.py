"""Compare ways of quantizing without labels: same model, same pictures, same time each; accuracy on labelled images.

- calibrate: scales and offsets alone;
- blocks: block after block is trained to give what the float block gives (BRECQ, Li et al., 2021), weights and scales
  by straight-through gradients; "qdrop" takes each input value from the float model with probability 0.5 (QDrop, Wei et
  al., 2022); "fisher" weighs every output by the squared gradient of the divergence of the model's outputs; "adaround"
  learns to round weights up or down instead (Nagel et al., 2020);
- outputs: the whole model is trained to give the float model's outputs, on views of the pictures: qvit.reconstruct.

Example: python benchmarks/reconstruction.py teacher.pt cifar10 --bits 2 --seconds 120
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qvit import QuantConfig, calibrate, quantize, reconstruct
from qvit.data.loader import make_loader, make_transform
from qvit.data.pictures import open_pictures
from qvit.data.sources import open_validation
from qvit.models.checkpoint import load_checkpoint
from qvit.nn.linear import QuantLinear
from qvit.nn.quantizer import to_codes
from qvit.quantization.outputs import output_distance
from qvit.runtime.environment import machine
from qvit.train.evaluate import evaluate

BATCH = 32
RATE = 1e-3
ROUNDING_RATE = 1e-2
ROUNDING_WEIGHT = 0.01
VARIANTS: dict[str, set[str]] = {
    "calibrate": set(),
    "blocks": {"blocks"},
    "blocks, qdrop": {"blocks", "qdrop"},
    "blocks, qdrop, fisher": {"blocks", "qdrop", "fisher"},
    "blocks, qdrop, adaround": {"blocks", "qdrop", "adaround"},
    "outputs": {"outputs"},
    "blocks, qdrop, then outputs": {"blocks", "qdrop", "outputs"},
}


def main() -> None:
    """Quantize by every variant, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="float checkpoint of a plain ViT")
    parser.add_argument("data", type=Path, help="folder with train/ (its labels are not used) and val/")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, for each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", help="those whose names start so, separated by semicolons [default: all]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher, spec = load_checkpoint(arguments.teacher)
    teacher.requires_grad_(False)
    transform = make_transform(spec.preprocessing)
    chosen = open_pictures(
        arguments.data / "train", spec.mode, count=arguments.pictures, held_out=1, seed=arguments.seed
    ).used
    images = torch.cat([batch.images for batch in make_loader(chosen, transform, 256, shuffle=False)])
    val = make_loader(open_validation(str(arguments.data), spec.classes, mode=spec.mode), transform, 256, shuffle=False)
    calibrated = quantize(teacher, QuantConfig(arguments.bits, arguments.bits, rectifier=None))
    calibrate(calibrated, images[:512].split(64))

    table = Table(
        title=f"{spec.name}, {arguments.bits} bits, {len(images)} pictures, {arguments.seconds:g} s each, "
        f"{arguments.threads} threads, {machine()['cpu']}"
    )
    for column in ("variant", "top-1", "steps", "seconds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    names = [
        name for name in VARIANTS if not arguments.variants or name.startswith(tuple(arguments.variants.split(";")))
    ]
    for name in names:
        torch.manual_seed(arguments.seed)
        student, parts = copy.deepcopy(calibrated), VARIANTS[name]
        began, steps = time.perf_counter(), 0
        seconds = arguments.seconds / max(1, len(parts & {"blocks", "outputs"}))
        if "blocks" in parts:
            steps += train_blocks(student.eval(), teacher, images, seconds, parts)
        if "outputs" in parts:
            steps += reconstruct(student, teacher, [images], minutes=seconds / 60, seed=arguments.seed).step
        taken = time.perf_counter() - began
        accuracy = evaluate(student, val, torch.device("cpu"))
        table.add_row(name, f"{accuracy.top1:.2f}", str(steps), f"{taken:.0f}")
        print(f"{name}: {accuracy.top1:.2f} after {steps} steps in {taken:.0f} s", flush=True)
    Console(width=100).print(table)


def train_blocks(student: Any, teacher: Any, images: Tensor, seconds: float, parts: set[str]) -> int:
    """Train block after block to give the float block's output, each for its part of the time; return the steps."""
    importance = output_importance(student, teacher, images) if "fisher" in parts else None
    quantized, floats = (in_chunks(functools.partial(stem, model), images) for model in (student, teacher))
    steps = 0
    for index, (block, reference) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        wanted = in_chunks(reference, floats)
        weights = None if importance is None else importance[index]
        steps += train_block(block, quantized, floats, wanted, weights, seconds / len(student.blocks), parts)
        quantized, floats = in_chunks(block, quantized), wanted
    return steps


def train_block(
    block: nn.Module,
    quantized: Tensor,
    floats: Tensor,
    wanted: Tensor,
    importance: Tensor | None,
    seconds: float,
    parts: set[str],
) -> int:
    """Train one block for some seconds; return the steps."""
    roundings = [Rounding(m) for m in block.modules() if isinstance(m, QuantLinear)] if "adaround" in parts else []
    groups = [{"params": [rounding.logits], "lr": 0.0, "peak": ROUNDING_RATE} for rounding in roundings]
    for name, parameter in block.named_parameters():
        fixed = roundings and ((name.endswith(".weight") and parameter.ndim > 1) or "weight_quantizer" in name)
        if not fixed:
            size = (
                1.0
                if name.endswith("log_scale")
                else 10 * max(float(parameter.detach().square().mean().sqrt()), 2.0**-6)
            )
            groups.append({"params": [parameter], "lr": 0.0, "peak": RATE * size})
    optimizer = torch.optim.Adam(groups)
    began, steps = time.perf_counter(), 0
    while (fraction := (time.perf_counter() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (0.5 + 0.5 * math.cos(math.pi * fraction))
        chosen = torch.randint(len(quantized), (BATCH,))
        x, target = quantized[chosen], wanted[chosen]
        if "qdrop" in parts:
            x = torch.where(torch.rand_like(x) < 0.5, floats[chosen], x)
        for rounding in roundings:
            rounding.apply()
        error = (block(x) - target).square()
        loss = (error if importance is None else error * importance[chosen]).mean()
        if roundings:
            loss = loss + ROUNDING_WEIGHT * sum(rounding.penalty(fraction) for rounding in roundings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    for rounding in roundings:
        rounding.finish()
    return steps


class Rounding:
    """AdaRound: whether weights of a layer are rounded up, learned as ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)``."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer, quantizer = layer, layer.weight_quantizer
        self.scale = quantizer.scale.detach()
        self.low, self.high = quantizer.low, quantizer.high
        weight = layer.weight.detach() / self.scale
        self.floor = weight.floor()
        up = (weight - self.floor).clamp(0.01, 0.99)
        self.logits = torch.log((up + 0.1) / (1.1 - up)).requires_grad_()
        layer.weight_quantizer.enabled = False
        self.parameter = layer.weight
        del layer.weight

    def up(self) -> Tensor:
        """Return the part of each weight that is rounded up, 0..1."""
        return (1.2 * torch.sigmoid(self.logits) - 0.1).clamp(0, 1)

    def apply(self) -> None:
        """Let the layer compute with the weights as they are rounded now."""
        self.layer.weight = (self.floor + self.up()).clamp(self.low, self.high) * self.scale

    def penalty(self, fraction: float) -> Tensor:
        """Return the regulariser, which drives every weight to one side as ``fraction`` goes to 1."""
        beta = 2 + 18 * (0.5 + 0.5 * math.cos(math.pi * fraction))
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def finish(self) -> None:
        """Put weights there that are on the grid, and the quantizer to work again."""
        del self.layer.weight
        codes = (self.floor + (self.up() >= 0.5)).clamp(self.low, self.high)
        assert torch.equal(codes, to_codes(codes * self.scale, self.scale, None, self.low, self.high))
        self.layer.weight = self.parameter
        self.layer.weight_quantizer.enabled = True
        with torch.no_grad():
            self.parameter.copy_(codes * self.scale)


def output_importance(student: Any, teacher: Any, images: Tensor) -> list[Tensor]:
    """Return, for each block, the squared gradients of the outputs' divergence by the block's output, of mean 1."""
    squares: list[list[Tensor]] = [[] for _ in student.blocks]
    for x in images.split(256):
        kept: list[Tensor] = []
        hidden = stem(student, x).detach()
        for block in student.blocks:
            hidden = block(hidden)
            kept.append(hidden)
        loss = output_distance(student.forward_head(student.norm(hidden)), teacher(x), classes=True) * len(x)
        for found, gradient in zip(squares, torch.autograd.grad(loss, kept), strict=True):
            found.append(gradient.square())
    return [whole / whole.mean() for whole in (torch.cat(found) for found in squares)]


def stem(model: Any, images: Tensor) -> Tensor:
    """Return what enters the first block."""
    tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    return tokens


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return ``function`` of all images, computed in batches."""
    return torch.cat([function(chunk) for chunk in images.split(256)])


if __name__ == "__main__":
    main()
