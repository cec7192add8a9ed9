"""A run that is there already: what goes on with it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import run, sentence
from conftest import MODEL
from qvit.models.checkpoint import load_checkpoint, write_checkpoint
from qvit.train.loop import read_metrics


def test_resume_goes_on_and_a_second_start_is_refused(training: list[str], tiny_float: Path, tmp_path: Path) -> None:
    arguments = [*training, "--teacher", str(tiny_float), "--method", "baseline"]
    assert run(*arguments, "--resume").status == 2
    assert not (tmp_path / "run").exists()
    first = run(*arguments)
    assert first.status == 0, first.err
    records = read_metrics(tmp_path / "run")
    assert "--resume" in sentence(run(*arguments))
    again = run(*arguments, "--resume")
    assert again.status == 0, again.err
    assert again.out.splitlines()[-1] == first.out.splitlines()[-1]
    assert read_metrics(tmp_path / "run") == records  # its seconds too: nothing was trained again


def test_post_training_quantization_is_not_overwritten(training: list[str], tiny_float: Path, tmp_path: Path) -> None:
    arguments = [*training, "--teacher", str(tiny_float), "--method", "ptq"]
    assert run(*arguments).status == 0
    assert "run/best.pt is there already: give another name" in sentence(run(*arguments, "--bits", "4"))


OTHERS = {
    "quantized.epochs 1, this one with quantized.epochs 2": ["--set", "quantized.epochs=2"],
    "quantized.lr 0.002, this one with quantized.lr 0.001": ["--set", "quantized.lr=1e-3"],
    "quantized.optimizer_args.betas not set, this one": ["--set", "quantized.optimizer_args.betas=[0.9, 0.99]"],
    "augmentation.hflip 0.0, this one with augmentation.hflip 0.5": ["--set", "augmentation.hflip=0.5"],
    "method q-vit, this one with method rectify": ["--method", "rectify"],
    "precision no, this one with precision bf16": ["--precision", "bf16"],
    "accumulate 1, this one with accumulate 2": ["--accumulate", "2"],
    "decode_once False, this one with decode_once True": ["--decode-once"],
    "seed 0, this one with seed 1": ["--seed", "1"],
    "of another model or another run": ["--bits", "3"],
}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, digit_folder: Path, tiny_float: Path
) -> list[str]:
    """The command of a run that is finished."""
    out = tmp_path_factory.mktemp("finished")
    arguments = ["train", MODEL, "--data", str(digit_folder), "--recipe", str(tiny_recipe), "--bits", "2"]
    arguments += ["--teacher", str(tiny_float), "--out", str(out)]
    done = run(*arguments)
    assert done.status == 0, done.err
    return arguments


@pytest.mark.parametrize("named", OTHERS)
def test_a_resumed_run_has_the_same_settings(finished: list[str], named: str) -> None:
    said = sentence(run(*finished, "--resume", *OTHERS[named]))
    assert named in said
    assert "another --out" in said


def test_a_resumed_run_has_the_same_teacher(finished: list[str], tiny_float: Path, tmp_path: Path) -> None:
    model, spec = load_checkpoint(tiny_float)
    torch.nn.init.zeros_(model.norm.bias)
    write_checkpoint(tmp_path / "other.pt", spec, model)
    said = sentence(run(*finished, "--resume", "--teacher", tmp_path / "other.pt"))
    assert "last.pt is of a run with teacher " in said
    assert run(*finished, "--resume", "--workers", "1", "--save-every", "7").status == 0
