"""Whoever gives a command another file than it takes is told what the file is, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from commands import run, sentence
from qvit.exporting.onnx_file import export_onnx
from qvit.exporting.web_file import web_file
from qvit.format.packed import read_packed
from qvit.kinds import _STARTS, kind_of
from qvit.models.reading import read_file

PACKED, CHECKPOINT = ("info",), ("analyze", "--images", ".", "--out", "out")
"""A command that takes packed models, and one that takes checkpoints."""
EITHER = (PACKED, CHECKPOINT)
FILES: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "q.pt": ((PACKED,), "is a checkpoint of qvit's: qvit export makes a packed model of it."),
    "q.safetensors": (EITHER, "is a checkpoint of qvit's: let its name end with .pt."),
    "m.safetensors": ((CHECKPOINT,), "is a packed model: give the checkpoint that it was made of."),
    "m.pt": ((CHECKPOINT,), "is a packed model: let its name end with .safetensors."),
    "weights.safetensors": (EITHER, "is a file of weights, of which qvit quantize makes a model of qvit's."),
    "weights.pth": (EITHER, "is a file of weights, of which qvit quantize makes a model of qvit's."),
    "m.onnx": (EITHER, "is an ONNX file, which qvit writes and does not read: give the model that it was made of."),
    "model.qvit": (EITHER, "is a packed model as the browser takes it: give the one that it was made of."),
    "site": (EITHER, "is a site of qvit web's: give the packed model that it was made of."),
    "run": (EITHER, "is the folder of a run: give the best.pt in it."),
    "hub": (EITHER, "is a folder of weights, of which qvit quantize makes a model of qvit's."),
    "folder": (EITHER, "is a folder and no file."),
    "cat.png": (EITHER, "is a picture and no model."),
    "cat.jpg": (EITHER, "is a picture and no model."),
    "cat.webp": (EITHER, "is a picture and no model."),
    "empty": (EITHER, "is empty."),
    "text": (EITHER, "is a text and no model."),
    "config.json": (EITHER, "is JSON and holds no weights."),
    "page.safetensors": (EITHER, "is a web page and no model: download the file itself."),
    "pointer.safetensors": (EITHER, "is a pointer of Git LFS and not the file itself: run git lfs pull."),
}
"""By name, the commands that take something else, and what they say of it."""


@pytest.fixture(scope="module")
def files(float_file: Path, packed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all of them."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("site", "run", "hub", "folder"):
        (folder / name).mkdir()
    for name in ("q.pt", "q.safetensors", "run/best.pt"):
        shutil.copy(float_file, folder / name)
    for name in ("m.safetensors", "m.pt"):
        shutil.copy(packed_file, folder / name)
    weights = {"vit.layernorm.bias": torch.zeros(3)}
    save_file(weights, folder / "weights.safetensors", {"format": "pt"})
    torch.save(weights, folder / "weights.pth")
    export_onnx(packed_file, folder / "m.onnx")
    for name in ("model.qvit", "site/model.qvit"):
        (folder / name).write_bytes(web_file(read_packed(packed_file)))
    for name in ("cat.png", "cat.jpg", "cat.webp"):
        Image.new("RGB", (16, 16)).save(folder / name)
    texts = {"empty": "", "text": "größer als\n", "config.json": '{"a": 1}', "hub/config.json": "{}"}
    texts |= {"page.safetensors": "\n<!DOCTYPE html>", "pointer.safetensors": "version https://git-lfs.github.com/spec"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_command_that_takes_another_file_says_what_this_one_is(
    files: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    commands, text = FILES[name]
    for command, *options in commands:
        assert sentence(run(command, name, *options)) == f"qvit: {name} {text}"


def test_export_says_what_cannot_become_a_packed_model(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for name in ("q.safetensors", "weights.safetensors", "page.safetensors"):
        assert sentence(run("export", name, "new.safetensors")) == f"qvit: {name} {FILES[name][1]}"


@pytest.mark.parametrize(("name", "read"), [("q.pt", read_file), ("m.safetensors", read_packed)])
def test_what_is_damaged_is_not_told_to_be_whole(
    files: Path, tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    content = bytearray((files / name).read_bytes())
    for cut in (len(content) // 2, len(content) - 9):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(Exception, match="cut short|damaged"):
            read(tmp_path / name)


@given(st.sampled_from([b"", b"PK\x03\x04", b"\x08\x0a", *(start for start, _ in _STARTS)]), st.binary())
def test_nothing_is_too_strange_to_be_looked_at(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "strange"
    path.write_bytes(start + rest)
    kind_of(path)
