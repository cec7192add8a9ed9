"""The study's programs from end to end, on a plan of seconds."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import commands
import jobs
from commands import Done
from qvit.train.run import Run
from study import main

PLAN = """
model: vit_tiny_patch16_224
recipe: digits
set: [model_args.depth=2, model_args.patch_size=4, full_precision.epochs=2, quantized.calibration_images=64]
quantized: [quantized.epochs=1, quantized.batch_size=256]
teacher: {}
options: {cpu: true}
experiments:
  - {name: chain, why: both methods, bits: [2], seeds: [0, 1], rows: "baseline,q-vit-head", table: true, figures: true}
  - name: lambda-1
    why: a heavier pull
    bits: [2]
    seeds: [0]
    rows: q-vit-head
    set: [quantized.guided_weight=1.0]
    against: chain
"""


def _stopped_at_the_first_epoch(said: Path, *arguments: str | Path) -> None:
    """Run the program, whose time is up when the first epoch is saved: the teacher's first of two."""
    save, timers = Run.save, []

    class Clock(threading.Timer):
        def start(self) -> None:
            timers.append(self)

    def save_and_look_at_the_clock(run: Run, **options: Any) -> None:
        save(run, **options)
        for timer in timers:
            timer.function(*timer.args)

    threading.Timer, Run.save = Clock, save_and_look_at_the_clock  # type: ignore[misc, method-assign]
    done = study(*arguments)
    said.write_text(f"{done.status} {done.err}")


def study(*arguments: str | Path) -> Done:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return commands.run(*arguments, main=main)
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "plan.yaml").write_text(PLAN)
    run = ["run", folder / "plan.yaml", "--data", "digits", "--out", folder / "runs"]
    process = jobs.start(_stopped_at_the_first_epoch, folder / "said", *run, "--minutes", "600")
    process.join()
    assert (folder / "said").read_text().startswith("143 qvit: Stopped by SIGTERM at the end of epoch 1")
    again = study(*run)
    assert again.status == 0, again.err
    results = folder / "tiny.jsonl"
    done = study("collect", folder / "plan.yaml", "--data", "digits", "--out", folder / "runs", "--results", results)
    assert done.status == 0, done.err
    assert "5 runs and their teacher" in done.out
    return folder


def test_one_file_holds_the_teacher_and_every_run(folder: Path) -> None:
    teacher, *runs = [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]
    assert teacher["experiment"] == "teacher"
    assert len(teacher["history"]) == 2
    assert len(teacher["weights"]) == 64
    assert [(r["experiment"], r["row"], r["seed"]) for r in runs] == [
        ("chain", "baseline", 0), ("chain", "baseline", 1), ("chain", "q-vit-head", 0), ("chain", "q-vit-head", 1),
        ("lambda-1", "q-vit-head", 0),
    ]  # fmt: skip
    assert all(len(run["history"]) == 1 and len(run["layers"]) == 2 for run in runs)


def test_report_is_made_from_that_file_alone(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- study: tiny -->\nold\n<!-- end of study -->\nafter\n")
    done = study("report", folder / "plan.yaml", "--results", folder / "tiny.jsonl", "--document", document)
    assert done.status == 0, done.err
    text = document.read_text()
    assert text.startswith("before\n<!-- study: tiny -->\n")
    assert text.endswith("<!-- end of study -->\nafter\n")
    assert "old" not in text
    _, *runs = [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]
    base, both, trial = ([r["top1"] for r in runs if (r["experiment"], r["row"]) == key] for key in (
        ("chain", "baseline"), ("chain", "q-vit-head"), ("lambda-1", "q-vit-head")
    ))  # fmt: skip
    assert f"| {both[0] - base[0]:+.2f}, {both[1] - base[1]:+.2f} |" in text
    assert f"| a heavier pull | `guided_weight=1.0` | chain | 2 | Q-ViT (both), head | 1 | {trial[0]:.2f} |" in text
    assert f"| {trial[0] - both[0]:+.2f} |" in text
    best = max(runs, key=lambda r: r["top1"])
    assert f"2 bits: **{best['top1']:.2f}**" in text
    assert f"--seed {best['seed']} --decode-once --out best-2-bit" in text
    figures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert figures == [f"tiny-chain-{kind}.svg" for kind in ("bars", "curves", "layers", "queries")]
    assert all(f"figures/{name}" in text for name in figures)
    again = study("report", folder / "plan.yaml", "--results", folder / "tiny.jsonl", "--document", document)
    assert again.status == 0, again.err
    assert document.read_text() == text


def test_what_is_no_plan_is_named(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("rows:", "methods:"))
    done = study("run", plan, "--data", "digits", "--out", tmp_path)
    assert done.status == 2
    assert done.err.startswith(f"qvit: {plan} is no plan of a study:")
    assert "methods" in done.err


def test_a_document_without_a_place_for_it_is_named(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("nothing\n")
    done = study("report", folder / "plan.yaml", "--results", folder / "tiny.jsonl", "--document", document)
    assert done.status == 2
    assert done.err.startswith(f"qvit: {document} has no lines <!-- study: tiny -->")
    assert document.read_text() == "nothing\n"
