"""Training in processes of its own, which can be killed or work together; forked from a server with PyTorch loaded."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvit.data.sources import ImageSets, open_data
from qvit.models.spec import create_model, describe
from qvit.train.methods import FloatModel, train_full_precision, train_quantized
from qvit.train.options import Options
from qvit.train.recipe import Recipe, load_recipe

TINY = ["model_args.depth=2", "model_args.patch_size=4", "model_args.embed_dim=24", "model_args.num_heads=2"]
MODEL = "vit_tiny_patch16_224"

CONTEXT = multiprocessing.get_context("forkserver")
"""Of processes that have PyTorch loaded when they start."""
CONTEXT.set_forkserver_preload(["qvit.train.methods", "sklearn.datasets"])


def parts(changes: list[str]) -> tuple[Recipe, ImageSets, FloatModel]:
    """Return recipe, digits and an untrained tiny float model, always the same one."""
    recipe = load_recipe("digits", [*TINY, *changes])
    data = open_data("digits", mode="L")
    spec = describe(MODEL, recipe.model_args, data.classes, recipe.preprocessing)
    torch.manual_seed(0)
    return recipe, data, FloatModel(create_model(spec).eval(), spec)


def quantized(out: Path, changes: list[str], bits: int = 3, **options: Any) -> list[dict[str, float]]:
    """Train a quantized digits model; return its records."""
    recipe, data, start = parts(changes)
    made = Options(out, cpu=True, **options)
    return train_quantized(
        start, start, "q-vit", (bits, bits), "head", data, recipe, made, Console(file=io.StringIO())
    ).history


def full_precision(out: Path, changes: list[str], **options: Any) -> list[dict[str, float]]:
    """Train a float digits model; return its records."""
    recipe, data, start = parts(changes)
    made = Options(out, cpu=True, **options)
    return train_full_precision(start.spec, data, recipe, made, Console(file=io.StringIO())).history


def killed(train: Callable[..., Any], step: int | None, save: int | None, *args: Any, **kwargs: Any) -> None:
    """Train and be killed by SIGKILL: right after the ``step``-th step, or half-way through the ``save``-th save."""
    optimizer_step, torch_save = torch.optim.Optimizer.zero_grad, torch.save
    steps = saves = 0

    def count_steps(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer_step(self, *args, **kwargs)

    def half_a_save(content: Any, path: Path) -> None:
        nonlocal saves
        torch_save(content, path)
        saves += 1
        if saves == save:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.optim.Optimizer.zero_grad = count_steps  # type: ignore[method-assign, assignment]
    torch.save = half_a_save  # type: ignore[assignment]
    train(*args, **kwargs)


def start(
    function: Callable[..., Any], *args: Any, rank: int = 0, world: int = 1, store: str = "", **kwargs: Any
) -> Any:
    """Start ``function`` in a process, the ``rank``-th of ``world``, which find each other by the file ``store``."""
    process = CONTEXT.Process(target=_child, args=(function, args, kwargs, rank, world, store))
    process.start()
    return process


def together(function: Callable[..., Any], *args: Any, world: int = 2, **kwargs: Any) -> None:
    """Run ``function`` in ``world`` processes joined by gloo, and wait for them."""
    with tempfile.TemporaryDirectory() as folder:  # and no port, which another program might take before they do
        store = f"{folder}/store"
        processes = [start(function, *args, rank=rank, world=world, store=store, **kwargs) for rank in range(world)]
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * world


def _child(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rank: int, world: int, store: str
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # of something that a later PyTorch takes away
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    function(*args, **kwargs)
    if world > 1:
        torch.distributed.destroy_process_group()
