"""The commands end to end, on budgets of seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import run, sentence
from conftest import MODEL
from qvit._version import __version__
from qvit.models.checkpoint import load_checkpoint, weights_checksum
from qvit.quantization.distill import DistillationLoss
from qvit.train.loop import read_metrics


def test_float_training_leaves_checkpoints_metrics_and_tensorboard(tiny_float: Path) -> None:
    folder = tiny_float.parent
    assert (folder / "last.pt").exists()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert list((folder / "tensorboard").glob("events.*"))


def test_the_last_line_tells_the_best_and_the_last_epoch_and_recommends_one(tiny_float: Path) -> None:
    folder = tiny_float.parent
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best, last = max(records, key=lambda record: record["val_top1"]), records[-1]
    assert best["val_top1"] > last["val_top1"]
    told = [f"epoch {r['epoch']}, top-1 {r['val_top1']:.2f}, top-5 {r['val_top5']:.2f}" for r in (best, last)]
    sums = [weights_checksum(load_checkpoint(folder / name)[0])[:16] for name in ("best.pt", "last.pt")]
    assert (folder / "said").read_text().splitlines()[-1] == (
        f"full precision, 359 validation images: best {told[0]}, in {tiny_float} (take this one); last {told[1]}, in "
        f"{folder / 'last.pt'}; SHA-256 of the weights {sums[0]}... and {sums[1]}..."
    )
    for name, record in (("best.pt", best), ("last.pt", last)):
        assert load_checkpoint(folder / name)[1].metrics["val_top1"] == record["val_top1"]


def test_evaluation_repeats_what_training_measured(tiny_float: Path) -> None:
    records = [json.loads(line) for line in (tiny_float.parent / "metrics.jsonl").read_text().splitlines()]
    best = max(records, key=lambda record: record["val_top1"])
    done = run("eval", tiny_float, "--data", "digits")
    assert done.status == 0, done.err
    assert f"{best['val_top1']:.2f}" in done.out
    assert f"{best['val_top5']:.2f}" in done.out
    assert "359" in done.out
    assert "32 (float)" in done.out


@pytest.mark.parametrize("method", ["q-vit", "baseline", "rectify", "distill", "reconstruct", "ptq"])
def test_every_method_trains_and_its_checkpoint_evaluates(
    training: list[str], tiny_float: Path, digit_folder: Path, tmp_path: Path, method: str
) -> None:
    done = run(*training, "--teacher", tiny_float, "--method", method, "--override", "blocks.0.*=4/8")
    assert done.status == 0, done.err
    printed = re.search(r", 30 validation images: .*top-1 (\d+\.\d\d), top-5 (\d+\.\d\d), in .*best\.pt", done.out)
    assert printed
    evaluated = run("eval", tmp_path / "run" / "best.pt", "--data", digit_folder, "--batch-size", "20")
    assert evaluated.status == 0, evaluated.err
    assert {printed[1], printed[2]} <= set(re.findall(r"\b\d+\.\d\d\b", evaluated.out))
    files = ["best.pt"] if method in ("reconstruct", "ptq") else ["best.pt", "last.pt"]
    checksums = [weights_checksum(load_checkpoint(tmp_path / "run" / file)[0])[:16] for file in files]
    assert done.out.endswith(f"SHA-256 of the weights {' and '.join(f'{checksum}...' for checksum in checksums)}\n")
    assert "2/2" in evaluated.out


def test_installed_command_trains_without_a_teacher(training: list[str], tiny_float: Path, tmp_path: Path) -> None:
    """In a process that begins with nothing imported, as a user's does."""
    command = [Path(sys.executable).with_name("qvit"), *training, "--initial-model", tiny_float, "--method", "rectify"]
    command += ["--rectifier", "token", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = read_metrics(tmp_path / "run")
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"2 bits, + IRM, 30 validation images: best epoch 1, top-1 {record['val_top1']:.2f}")
    model, spec = load_checkpoint(tmp_path / "run" / "best.pt")
    assert spec.method == "rectify"
    assert weights_checksum(model)[:16] in last


def test_a_quantized_checkpoint_starts_a_model_of_other_bits(
    training: list[str], tiny_float: Path, tmp_path: Path
) -> None:
    assert run(*training, "--teacher", tiny_float).status == 0
    quantized = tmp_path / "run" / "last.pt"
    fewer = [
        *training,
        "--bits",
        "3",
        "--out",
        tmp_path / "fewer",
        "--initial-model",
        quantized,
        "--teacher",
        tiny_float,
    ]
    done = run(*fewer, "--method", "baseline")
    assert done.status == 0, done.err
    assert "3 bits, QAT baseline" in done.out
    assert "a teacher must be a float one" in sentence(
        run(*training, "--teacher", quantized, "--out", tmp_path / "none")
    )


def test_a_checkpoint_of_the_same_bits_keeps_its_scales(training: list[str], tiny_float: Path, tmp_path: Path) -> None:
    assert run(*training, "--teacher", tiny_float, "--method", "baseline").status == 0
    quantized = tmp_path / "run" / "last.pt"
    done = run(
        *training, "--out", tmp_path / "again", "--initial-model", quantized, "--teacher", tiny_float, "--method", "ptq"
    )
    assert done.status == 0, done.err
    models = [load_checkpoint(path)[0] for path in (quantized, tmp_path / "again" / "best.pt")]
    assert len({weights_checksum(model) for model in models}) == 1


def test_ablation_prints_a_table_and_keeps_finished_cells(
    tiny_recipe: Path, digit_folder: Path, tiny_float: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    arguments = [
        "ablate",
        MODEL,
        "--data",
        digit_folder,
        "--recipe",
        tiny_recipe,
        "--teacher",
        tiny_float,
        "--out",
        out,
    ]
    done = run(*arguments, "--bits", "4,2", "--seeds", "2", "--rows", "ptq,baseline")
    assert done.status == 0, done.err
    assert "post-training" in done.out
    assert "QAT baseline" in done.out
    cells = sorted(out.glob("*-bit/*/seed-*/result.json"))
    assert [str(cell.parent.relative_to(out)) for cell in cells] == [
        f"{bits}-bit/{row}/seed-{seed}" for bits in (2, 4) for row in ("baseline", "ptq") for seed in (0, 1)
    ]
    report = (out / "report.html").read_text()
    assert "QAT baseline" in report
    assert "full precision" in report
    written = {cell: cell.stat().st_mtime_ns for cell in cells}
    assert run(*arguments, "--bits", "4,2", "--seeds", "2", "--rows", "ptq,baseline").status == 0
    assert {cell: cell.stat().st_mtime_ns for cell in cells} == written


def test_nan_loss_stops_and_the_last_good_checkpoint_evaluates(
    training: list[str], digit_folder: Path, tiny_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: DistillationLoss, *args: object) -> torch.Tensor:
        return original(self, *args) * (float("nan") if self.progress >= 0.6 else 1.0)

    original = DistillationLoss.forward
    monkeypatch.setattr(DistillationLoss, "forward", poisoned)
    arguments = [*training, "--teacher", str(tiny_float), "--method", "baseline", "--set", "quantized.epochs=2"]
    message = sentence(run(*arguments))
    assert "NaN" in message
    assert "epoch 2" in message
    assert "last.pt" in message
    done = run("eval", tmp_path / "run" / "last.pt", "--data", digit_folder)
    assert done.status == 0, done.err


@pytest.mark.parametrize("section", ["full_precision", "quantized"])
def test_a_recipe_needs_the_section_alone_that_the_run_uses(
    tiny_recipe: Path, digit_folder: Path, tiny_float: Path, tmp_path: Path, section: str
) -> None:
    lines = [line for line in tiny_recipe.read_text().splitlines() if not line.startswith(("full", "quant"))]
    lines.append(f"{section}: {{epochs: 1, batch_size: 10, lr: 4e-3}}")
    (tmp_path / "one.yaml").write_text("\n".join(lines))
    float_run = ["train", MODEL, "--full-precision", "--data", digit_folder, "--recipe", tmp_path / "one.yaml"]
    few_bits = [
        "train",
        MODEL,
        "--bits",
        "4",
        "--teacher",
        tiny_float,
        "--data",
        digit_folder,
        "--recipe",
        tmp_path / "one.yaml",
    ]
    table = ["ablate", MODEL, "--teacher", tiny_float, "--data", digit_folder, "--recipe", tmp_path / "one.yaml"]
    runs = {"full_precision": [float_run], "quantized": [few_bits, table]}
    good = runs.pop(section)[0]
    done = run(*good, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    for other, commands in runs.items():
        for command in commands:
            said = sentence(run(*command, "--out", tmp_path / "none"))
            assert f"no {other}, which this run uses: add it with epochs, batch_size and lr" in said
    assert not (tmp_path / "none").exists()


def test_absent_training_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'qvit'; from qvit.cli.app import main; main()"
    command = [sys.executable, "-c", code, "eval", "best.pt", "--data", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'qvit[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_packages() -> None:
    done = subprocess.run([sys.executable, "-m", "qvit.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qvit {__version__}\n"
