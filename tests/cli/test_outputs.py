"""Nothing that is there is replaced, whichever command or function would write it, and no work is done before."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qvit
from commands import run, sentence
from conftest import CLASSES, MODEL, make_vit
from node import are_modules_built
from pictures import PREPROCESSING
from qvit.cli.app import app
from qvit.errors import ConfigError, OutputError
from qvit.exporting.files import export_file
from qvit.exporting.onnx_file import export_onnx
from qvit.exporting.packed import export_checkpoint
from qvit.exporting.web_site import write_site
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe, instantiate
from qvit.train.recipe import load_recipe

READ = {"model", "images", "checkpoint", "checkpoints", "file", "first", "second"}
"""Paths among the parameters of commands that are read."""
REPORT = ["out/report.html", "out/report.json"]
DIGITS = ("--data", "digits", "--cpu", "--out", "out")
PHOTOS = ("float.pt", "--cpu", "--images", "photos")
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "quantize out": (["quantize", *PHOTOS, "--out", "out/m.st"], ["out/m.st", "out/m.pt"]),
    "quantize report": (["quantize", *PHOTOS, "--out", "m.st", "--report", "out"], REPORT),
    "search-bits out": (["search-bits", *PHOTOS, "--budget-mb", "1", "--out", "out/bits"], ["out/bits"]),
    "search-bits report": (["search-bits", *PHOTOS, "--budget-mb", "1", "--out", "bits", "--report", "out"], REPORT),
    "train out": (["train", MODEL, "--full-precision", *DIGITS], ["out/best.pt", "out/metrics.jsonl"]),
    "bench figure": (["bench", "m.safetensors", "--peers", "none", "--figure", "out/f.png"], ["out/f.png"]),
    "bench json_file": (["bench", "m.safetensors", "--peers", "none", "--json", "out/f.json"], ["out/f.json"]),
    "export out": (["export", "m.safetensors", "out/m.onnx"], ["out/m.onnx"]),
    "web out": (["web", "m.safetensors", "--out", "out/site"], ["out/site"]),
    "compare report": (["compare", "m.safetensors", "m.safetensors", "--images", "photos", "--report", "out"], REPORT),
    "ablate out": (["ablate", MODEL, "--teacher", "digits.pt", "--rows", "ptq", *DIGITS], ["out/report.html"]),
    "analyze out": (["analyze", *PHOTOS, "--out", "out"], ["out/report.html", "out/analysis.json", "out/figures"]),
    "demo out": (["demo", "--out", "out"], ["out/report.html", "out/float", "out/2-bit", "out/ptq-4-bit.safetensors"]),
}
"""A command for each option that names what is written, and what it would write."""
OCCUPANTS: dict[str, Callable[[Path], Any]] = {
    "a file": lambda path: path.write_text("mine"),
    "a folder": lambda path: path.mkdir(),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture
def inputs(float_file: Path, packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with models and pictures."""
    monkeypatch.chdir(tmp_path)
    Path("float.pt").write_bytes(float_file.read_bytes())
    Path("m.safetensors").write_bytes(packed_file.read_bytes())
    Path("photos").mkdir()
    Image.new("RGB", (16, 16)).save("photos/0.png")
    return tmp_path


def content(folder: Path) -> dict[Path, bytes | str]:
    """Return what is in a folder, by path."""
    return {path: path.read_bytes() if path.is_file() else str(path.is_symlink()) for path in folder.rglob("*")}


def remove(path: Path) -> None:
    """Remove a file, a link or an empty folder."""
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()


def test_every_path_that_a_command_takes_is_read_or_seen_to_be_new() -> None:
    found = set()
    for command in app.registered_commands:
        assert command.callback is not None
        function = inspect.unwrap(command.callback)
        for name, kind in typing.get_type_hints(function).items():
            if Path in (kind, *typing.get_args(kind)) and name not in READ:
                found.add(f"{function.__name__.replace('_', '-')} {name}")
    assert found == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_replaces_nothing(inputs: Path, name: str) -> None:
    command, outputs = COMMANDS[name]
    if name == "web out" and not are_modules_built():
        pytest.skip("the engine of the browser is not built: make web")
    if name == "ablate out":
        recipe = load_recipe("digits")
        spec = describe(MODEL, recipe.model_args, list("0123456789"), recipe.preprocessing)
        write_checkpoint(Path("digits.pt"), spec, instantiate(spec))
    Path("out").mkdir()
    for output in map(Path, outputs):
        OCCUPANTS["a link that leads nowhere"](output)  # for an output that is there to one look and not to another
        before = content(inputs)
        assert f"{output} is there already: give another name" in sentence(run(*command))
        assert content(inputs) == before
        output.unlink()
    Path("out").rmdir()
    Path("out").write_text("mine")  # a file where a folder has to be
    assert sentence(run(*command)).endswith(": out is no folder: give another name.")
    assert Path("out").read_text() == "mine"


@pytest.fixture
def writers(inputs: Path) -> dict[str, Callable[..., object]]:
    """Return the functions that write to a path, with what they need beside it."""
    student = qvit.quantize(make_vit(), qvit.QuantConfig(4))
    qvit.calibrate(student, [torch.randn(8, 3, 16, 16)])
    known = {"preprocessing": {**PREPROCESSING, "input_size": (3, 16, 16)}, "classes": CLASSES}
    qvit.save_checkpoint(student, "q.pt", **known)
    return {
        "own.pt": functools.partial(qvit.save_checkpoint, student, **known),
        "own.safetensors": functools.partial(qvit.export, student, **known),
        "own.onnx": functools.partial(export_onnx, "m.safetensors"),
        "other.safetensors": functools.partial(export_checkpoint, "q.pt"),
        "other.onnx": functools.partial(export_file, Path("m.safetensors")),
        **({"site": functools.partial(write_site, "m.safetensors")} if are_modules_built() else {}),
    }


def test_a_function_replaces_nothing_unless_it_is_told_to(inputs: Path, writers: dict[str, Callable[..., Any]]) -> None:
    for name, write in writers.items():
        path = inputs / name
        for occupy in OCCUPANTS.values():
            occupy(path)
            before = content(inputs)
            with pytest.raises(ConfigError, match="is there already: give another name, or "):
                write(path)
            assert content(inputs) == before
            remove(path)
        with pytest.raises(OutputError, match=r"m\.safetensors is no folder: give another name\.$"):
            write(inputs / "m.safetensors" / name)
        write(inputs / "new" / name)
        if path.suffix and name.startswith("own"):
            path.write_text("mine")
            write(path, replace=True)
            assert path.read_bytes() == (inputs / "new" / name).read_bytes()
