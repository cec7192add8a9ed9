"""The study of docs/cifar10.md: a float teacher, the ablation and the trials around it, as a plan lists them.

A plan (benchmarks/study_cpu.yaml, benchmarks/study_gpu.yaml) names model, recipe and data preparation, and experiments:
each an ablation (qvit ablate) with entries of the recipe changed, and why. ``run`` trains the teacher and then whatever
is not finished, in the order of the plan; it can be stopped at any time and started again, and several of them may
share one folder. Its status is 143 if it was stopped (SIGTERM, --minutes), 0 once all is finished. ``collect`` writes
all that was measured into one file, a line per run; ``report`` makes tables and figures from that file alone.

Example:
  python benchmarks/study.py run benchmarks/study_cpu.yaml --data cifar10 --out study
  python benchmarks/study.py collect benchmarks/study_cpu.yaml --out study --results docs/study/cpu.jsonl
  python benchmarks/study.py report benchmarks/study_cpu.yaml --results docs/study/cpu.jsonl --document docs/cifar10.md
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console

from qvit.cli.ending import ends_in_a_sentence
from qvit.cli.options import console as plain_console
from qvit.data.resident import decode_once
from qvit.data.sources import ImageSets
from qvit.errors import TrainingStopped
from qvit.files import printable, write_text
from qvit.models.checkpoint import load_checkpoint, weights_checksum, write_checkpoint
from qvit.models.spec import ModelSpec
from qvit.runtime.environment import machine
from qvit.study.ablation import ablate, read_results, rows_named, teacher_statistics
from qvit.train.lock import alone_in
from qvit.train.loop import read_metrics
from qvit.train.methods import FloatModel, open_images, train_full_precision
from qvit.train.options import Options, make_accelerator
from qvit.train.run import can_go_on
from study_plan import Plan, read_plan
from study_report import write_report


def run(plan: Plan, data: str, out: Path, only: Iterable[str], minutes: float | None, console: Console) -> None:
    """Train the teacher and every experiment that is not finished."""
    signal.signal(signal.SIGTERM, _stop)  # between the runs; a run catches it by itself
    if minutes is not None:
        # As a scheduler would: the run saves itself and goes on the next time.
        timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    sets, spec = open_images(plan.model, plan.recipe_of(), data)
    sets = decode_once(sets, spec.preprocessing, console, workers=8 if torch.cuda.is_available() else 0)
    teacher = train_teacher(plan, spec, sets, out / "teacher", console)
    for experiment in plan.experiments:
        if only and experiment.name not in only:
            continue
        console.rule(experiment.name)
        options = Options(out / experiment.name, **plan.options)
        ablate(
            teacher,
            sets,
            plan.recipe_of(experiment),
            options,
            console,
            bits=experiment.bits,
            seeds=experiment.seeds,
            rows=rows_named(experiment.rows),
            ladder=experiment.ladder,
            overrides={name: tuple(b) if isinstance(b, list) else b for name, b in experiment.overrides.items()},
        )


def train_teacher(plan: Plan, spec: ModelSpec, sets: ImageSets, folder: Path, console: Console) -> FloatModel:
    """Return the teacher, trained first (or further) if it is not finished."""
    recipe = plan.recipe_of()
    epochs = recipe.hyperparameters("full_precision").epochs
    finished = folder / "model.pt"
    if not finished.exists():
        with alone_in(folder, make_accelerator(Options(folder, **plan.teacher))):
            if not (can_go_on(folder) and len(read_metrics(folder)) == epochs):
                console.rule("teacher")
                options = Options(folder, resume=can_go_on(folder), **plan.teacher)
                train_full_precision(spec, sets, recipe, options, console)
            model, spec = load_checkpoint(folder / "last.pt")
            write_checkpoint(finished, spec, model)  # without the optimizer: what the experiments need of it
    return FloatModel(*load_checkpoint(finished))


def collect(plan: Plan, data: str, out: Path, results: Path) -> int:
    """Write every finished run into one file and return how many there are.

    The first line is the teacher: accuracy, curve, statistics of its queries and keys, checksum and machine.
    """
    model, spec = load_checkpoint(out / "teacher" / "model.pt")
    sets, _ = open_images(plan.model, plan.recipe_of(), data)
    layers = teacher_statistics(FloatModel(model, spec), sets, Options(out))
    history = read_metrics(out / "teacher")
    lines: list[dict[str, Any]] = [
        {
            "experiment": "teacher",
            "top1": history[-1]["val_top1"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "history": history,
            "layers": [layer.to_dict() for layer in layers],
            "recipe": plan.recipe_of().to_dict(),
            "weights": weights_checksum(model),
            "machine": environment(),
        }
    ]
    for experiment in plan.experiments:
        lines += [{"experiment": experiment.name, **record} for record in read_results(out / experiment.name)]
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _stop(number: int, frame: object) -> None:
    raise TrainingStopped("Stopped by SIGTERM between two runs.")


def environment() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    about = machine()
    return {
        "processor": about["cpu"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": about["python"],
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


@ends_in_a_sentence
def main() -> None:
    """Run, collect or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect", "report"])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data", help="folder with train/ and val/ (benchmarks/cifar10_folders.py), or shards")
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=[], metavar="EXPERIMENT", help="run these alone")
    parser.add_argument("--minutes", type=float, help="stop and save after that time")
    parser.add_argument("--results", type=Path, help="file of all that was measured (JSON lines)")
    parser.add_argument("--document", type=Path, help="Markdown file whose section of the study is written anew")
    arguments = parser.parse_args()
    needed = {"run": ("data", "out"), "collect": ("data", "out", "results"), "report": ("results", "document")}
    for name in needed[arguments.action]:
        if getattr(arguments, name) is None:
            parser.error(f"{arguments.action} needs --{name}")
    plan = read_plan(arguments.plan)
    if arguments.action == "run":
        run(plan, arguments.data, arguments.out, arguments.only, arguments.minutes, plain_console())
    elif arguments.action == "collect":
        count = collect(plan, arguments.data, arguments.out, arguments.results)
        plain_console().print(printable(f"{count - 1} runs and their teacher in {arguments.results}"), soft_wrap=True)
    else:
        write_report(plan, arguments.results, arguments.document)


if __name__ == "__main__":
    main()
