"""Every example runs as its page says, on little: few steps, few pictures, random weights."""

from __future__ import annotations

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from sklearn.datasets import load_digits

import qvit
from qvit.format.packed import read_packed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
Capture = pytest.CaptureFixture[str]
MODEL = "test_vit"
"""timm's smallest: six blocks of width 64, images of 160 x 160."""


@pytest.fixture(autouse=True)
def _beside_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with what examples share within reach, and with a fifth of the digits."""
    monkeypatch.setattr(sklearn.datasets, "load_digits", functools.partial(load_digits, n_class=2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)


def run(name: str, *arguments: str) -> None:
    """Run an example in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of eight pictures."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def weights_of(path: Path, classes: int) -> str:
    """Write random weights of the model and return the path."""
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=classes).state_dict(), path)
    return str(path)


def test_a_model_of_ones_own_is_quantized_without_labels(photos: Path, tmp_path: Path, capfd: Capture) -> None:
    arguments = ["--model", MODEL, "--weights", weights_of(tmp_path / "own.pth", 7), "--classes", "7"]
    run("quantize_without_labels.py", "photos", *arguments, "--steps", "1")
    printed = capfd.readouterr().out
    assert re.search(r"^calibrated: same class as the float model for [\d.]+ %\nreconstructed: ", printed)
    assert re.search(r"^model.safetensors: 0\.\d+ MB$", printed, re.MULTILINE)
    assert read_packed(tmp_path / "model.safetensors").classes == [f"LABEL_{number}" for number in range(7)]


def test_pictures_are_found_by_vectors_of_few_bits(photos: Path, tmp_path: Path, capfd: Capture) -> None:
    arguments = ["--model", MODEL, "--weights", weights_of(tmp_path / "own.pth", 0)]
    command = ["image_search.py", "photos", "photos/3.png", *arguments, "--steps", "1", "--count", "3"]
    run(*command)
    first, *shown = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"test_vit, 4 bits: mean cosine [\d.]+ with the float model's vectors", first)
    assert len(shown) == 3
    assert shown[0] == "1.000  photos/3.png"
    (photos / "9.png").write_bytes((photos / "3.png").read_bytes())
    run(*command)
    assert capfd.readouterr().out.splitlines() == shown, "what is found again is that of the index"
    with pytest.raises(SystemExit, match="2"):
        run(*command, "--model", "vit_base_patch16_224")
    assert "index holds vectors of test_vit: give another --index" in capfd.readouterr().err


LITTLE = ["--epochs", "1", "--float-epochs", "1", "--bits", "3"]


def check_trained(printed: str) -> None:
    """Check what a training of little prints, and the files that it writes."""
    assert re.search(r"^digits.safetensors: \d+ kB, ", printed, re.MULTILINE)
    codes = qvit.load("digits.safetensors").codes(np.zeros((1, 1, 8, 8), np.float32))
    assert max(values.max() for name, values in codes.items() if name.startswith("blocks.")) < 2**3
    assert qvit.load_checkpoint("digits.pt")[1].quant_config == qvit.QuantConfig(3, 3).to_dict()


@pytest.mark.parametrize("name", ["train.py", "train_lightning.py"])
@pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and of what PyTorch will call otherwise
def test_training_ends_in_a_file_of_as_many_bits(name: str, capfd: Capture) -> None:
    run(name, *LITTLE)
    check_trained(capfd.readouterr().out)


def test_two_processes_train_together(capfd: Capture) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of what was alone in this process
    debug_launcher(run, ("train_accelerate.py", *LITTLE), num_processes=2)
    printed = capfd.readouterr().out
    assert printed.count("trained by 2 processes") == 1
    check_trained(printed)


def test_the_notebook_runs_from_top_to_bottom() -> None:
    cells = json.loads((EXAMPLES / "digits.ipynb").read_text(encoding="utf-8"))["cells"]
    shell = InteractiveShell()  # what a kernel runs cells in, without the start of another process
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            source, count = re.subn(r"= \d+", "= 1", source)
            assert count == 3
        shell.run_cell(source).raise_error()
