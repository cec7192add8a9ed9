"""Images per second of loading alone and of training alone, and which of the two limits a run.

Loading: decode and augment with 0, 1, ... worker processes, as the recipe's training does it. Training: whole Q-ViT
steps (teacher, student, guided distillation, optimizer) over one batch that is there already. The trainer loads while
it computes only if there are workers: with 0 of them the times add up.

Example: python benchmarks/loading.py vit_tiny_patch16_224 --data digits --recipe digits --json loading.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.optim import create_optimizer_v2
from torch import nn

from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import ImageSets
from qvit.models.spec import ModelSpec, create_model
from qvit.train.methods import open_images
from qvit.train.recipe import Recipe, load_recipe


def loading_rate(data: ImageSets, spec: ModelSpec, recipe: Recipe, workers: int, seconds: float) -> float:
    """Return images per second of the training loader, measured for at least ``seconds`` after its first batch."""
    transform = make_transform(spec.preprocessing, recipe.augmentation)
    hyperparameters = recipe.hyperparameters("quantized")
    loader = make_loader(
        data.train,
        transform,
        hyperparameters.batch_size,
        shuffle=True,
        workers=workers,
        repeats=hyperparameters.repeated_augmentation,
        device=_device(),
    )
    images, start = 0, 0.0
    while True:  # epoch after epoch, as long as it takes
        for batch in loader:
            if not start:  # the workers have started
                start = time.perf_counter()
                continue
            images += len(batch.labels)
            passed = time.perf_counter() - start
            if passed >= seconds:
                return images / passed


def training_rate(data: ImageSets, spec: ModelSpec, recipe: Recipe, steps: int, *, compiled: bool) -> float:
    """Return images per second of training without loading: the median of ``steps`` steps."""
    device, hyperparameters = _device(), recipe.hyperparameters("quantized")
    transform = make_transform(spec.preprocessing, recipe.augmentation)
    batch = next(iter(make_loader(data.train, transform, hyperparameters.batch_size, shuffle=True)))
    images, labels = batch.images.to(device), batch.labels.to(device)
    torch.manual_seed(0)
    teacher: nn.Module = create_model(spec).to(device).eval()
    student = quantize(teacher, QuantConfig())
    calibrate(student, [images[:8]])
    student.train()
    loss_fn = DistillationLoss(teacher)
    optimizer = create_optimizer_v2(
        student, opt=hyperparameters.optimizer, lr=hyperparameters.lr, **hyperparameters.optimizer_args
    )
    if compiled:
        torch.compiler.reset()
        teacher.compile()
        student.compile()
    times = []
    for step in range(steps + 2):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_fn(student, images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        float(loss.detach())  # waits for a GPU, as the training loop does
        if step >= 2:  # the first compiles
            times.append(time.perf_counter() - start)
    return len(labels) / statistics.median(times)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Measure, print a table and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name of the architecture")
    parser.add_argument("--data", required=True, help="digits, a folder of images, or a timm data set")
    parser.add_argument("--data-root")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="largest number to try")
    parser.add_argument("--seconds", type=float, default=20.0, help="of loading for each number of workers")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    data, spec = open_images(arguments.model, recipe, arguments.data, root=arguments.data_root)

    loading = {w: loading_rate(data, spec, recipe, w, arguments.seconds) for w in range(arguments.workers + 1)}
    training = training_rate(data, spec, recipe, arguments.steps, compiled=arguments.compile)
    best = max(rate for workers, rate in loading.items() if workers or len(loading) == 1)
    limit = "loading" if best < training else "training"
    table = Table(title=f"{arguments.model}, {arguments.data}, {_device()}, PyTorch {torch.__version__}")
    for column in ("what", "images/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for workers, rate in loading.items():
        table.add_row(f"loading, {workers} workers", f"{rate:.0f}")
    table.add_row("training" + (", compiled" if arguments.compile else ""), f"{training:.0f}")
    console = Console()
    console.print(table)
    console.print(f"{limit} limits: {min(best, training):.0f} images/s at most.")
    if arguments.json:
        versions = {"torch": torch.__version__, "timm": timm.__version__, "cores": os.cpu_count()}
        report: dict[str, Any] = {"loading": loading, "training": training, "limit": limit, "versions": versions}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
