"""Texts from files are texts: no markup, no command to the terminal, no traceback whatever it can show."""

from __future__ import annotations

import dataclasses
import json
import re
import string
import tempfile
from pathlib import Path

import pytest
import typer.main
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from commands import Done, run, sentence
from packed_models import make_packed
from qvit.cli import app as cli
from qvit.files import printable
from qvit.format.packed import write_packed

ENCODINGS = ("utf-8", "latin-1", "ascii")
AWKWARD = [
    "[/x]",
    "[bold]",
    "[red]a[/]",
    ":cat:",
    "\x1b[31m",
    "\x1b]0;t\x07",
    "\n",
    "\r",
    "\x9b2J",
    "\u202e",
    "猫",
    "$x$",
    "%",
]
"""What terminals, rich, matplotlib and formats take for more than text."""
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=5)
CLASSES = st.lists(TEXTS.map("".join), min_size=5, max_size=5, unique=True)
# Bytes that are not UTF-8 become halves of surrogate pairs.
NAMES = st.lists(st.sampled_from([*AWKWARD, "\udcff", "-"]) | st.text(string.ascii_letters, max_size=3), max_size=5)
MODEL = "vit_tiny_patch16_224"
RECIPE = """
model_args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}
preprocessing: {mean: [0.5], std: [0.5], crop_pct: 1.0, interpolation: bilinear}
full_precision: {epochs: 1, batch_size: 4, lr: 4e-3}
quantized: {epochs: 1, batch_size: 4, lr: 2e-3, calibration_images: 4}
"""


def check(done: Done) -> None:
    """Check that nothing but text was printed."""
    for stream in (done.out, done.err):
        assert "Traceback" not in stream
        assert all(c.isprintable() or c == "\n" for c in stream), repr(stream)


@settings(deadline=None, max_examples=25)
@given(classes=CLASSES, name=NAMES, encoding=st.sampled_from(ENCODINGS))
@example(classes=["[/]", "[bold]b", "\x1b[2J", "a\nb", "猫"], name=["[/x]", "\udcff", "\n"], encoding="ascii")
@example(classes=["a", "b", "\u202e", "\x9b", "é"], name=["-", ":cat:"], encoding="latin-1")
def test_predict_and_info_show_hostile_names_as_text(classes: list[str], name: list[str], encoding: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("".join(name).replace("/", "|") + ".safetensors")
        model = make_packed(name=printable("".join(classes))[:40])
        write_packed(path, dataclasses.replace(model, classes=classes, origin={classes[0]: classes[1]}))
        image = path.with_suffix(".png")
        Image.new("RGB", (8, 8)).save(image.open("wb"), format="png")
        broken = path.with_suffix(".jpg")
        broken.write_bytes(b"")

        done = run("predict", path, image, broken, encoding=encoding)
        check(done)
        assert printable(broken).encode(encoding, "backslashreplace").decode(encoding) in sentence(done)
        if encoding == "utf-8":
            lines = done.out.splitlines()
            assert lines[0] == printable(image)
            assert sorted(line[11:] for line in lines[1:]) == sorted(map(printable, classes))

        done = run("predict", path, image, "--json", encoding=encoding)
        check(done)
        (result,) = json.loads(done.out)
        assert result["image"] == str(image)
        assert {entry["name"] for entry in result["classes"]} == set(classes)

        with pytest.MonkeyPatch.context() as wide:
            wide.setenv("COLUMNS", "1000")
            done = run("info", path, encoding=encoding)
        check(done)
        assert done.status == 0
        if encoding == "utf-8":
            assert f"5: {'; '.join(map(printable, classes))} " in done.out

        check(run("info", path, image, encoding=encoding))  # an argument too many
        check(run("info", path.with_suffix(".none"), encoding=encoding))


@settings(deadline=None, max_examples=20)
@given(name=NAMES, encoding=st.sampled_from(ENCODINGS))
@example(name=["--", "\x1b[31m"], encoding="utf-8")
@example(name=[], encoding="utf-8")
def test_what_was_typed_is_repeated_as_text(name: list[str], encoding: str) -> None:
    text = "".join(name)
    for arguments in (
        ["info", f"--{text}"],
        ["train", text, "--full-precision", "--data", "digits", "--out", "run"],
        ["train", MODEL, "--full-precision", "--data", text, "--recipe", text, "--out", text],
        ["train", MODEL, "--bits", text, "--data", text, "--out", text],
        ["eval", text, "--data", text],
        ["export", text, text],
        ["ablate", MODEL, "--data", "digits", "--teacher", text, "--rows", text, "--out", text],
        [text],
    ):
        done = run(*arguments, encoding=encoding)
        check(done)
        assert done.status == 2, done


def test_folders_and_classes_with_hostile_names_go_through_every_command(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    data = tmp_path / "[/d]\x1b[31m"
    for split in ("train", "val"):
        for shade, name in enumerate(("[x]\nb:cat:", "\u202e\x9b[bold]")):
            (data / split / name).mkdir(parents=True)
            for n in range(4):
                Image.new("L", (8, 8), 90 * shade + 10 * n).save(data / split / name / f"{n}.png")
    out = tmp_path / "run" / "[/x]\x1b[31m\n$a$"
    common = ["--data", data, "--recipe", tmp_path / "r.yaml", "--cpu"]
    packed, figure = out / "[m].safetensors", out / "f.png"
    rows = ["--rows", "ptq", "--teacher", out / "best.pt"]
    for arguments in (
        ["train", MODEL, "--full-precision", *common, "--out", out],
        ["train", MODEL, "--bits", "2", "--teacher", out / "best.pt", *common, "--out", out / "q"],
        ["eval", out / "q" / "best.pt", "--data", data, "--cpu"],
        ["export", out / "q" / "best.pt", packed],
        ["eval", packed, "--data", data, "--cpu"],
        ["bench", packed, "--batch", "1", "--threads", "1", "--peers", "none", "--rounds", "1", "--figure", figure],
        ["ablate", MODEL, "--bits", "2", "--seeds", "1", *rows, *common, "--out", out / "table"],
    ):
        done = run(*arguments)
        check(done)
        assert done.status == 0, done
    assert (out / "table" / "report.html").exists()
    assert figure.exists()
    (data / "val" / "\u202e\x9b[bold]" / "1.png").write_bytes(b"")
    done = run("eval", out / "best.pt", "--data", data, "--cpu")
    check(done)
    assert printable(data / "val" / "\u202e\x9b[bold]" / "1.png") in sentence(done)


def test_a_folder_that_tensorboard_cannot_write_to_is_refused_at_once(tmp_path: Path) -> None:
    done = run("train", MODEL, "--full-precision", "--data", "digits", "--out", tmp_path / "a\udcff")
    assert r"a\udcff: that name is not UTF-8" in sentence(done)


COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [60, 120, 200])
def test_help_shows_every_default_and_an_example(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run(name, "--help")
    assert (done.status, done.err) == (0, "")
    assert re.search(rf"^ *Examples?:\n +(torchrun .*)?qvit {name} ", done.out, re.MULTILINE), f"{name} has no example"
    shown = " ".join(done.out.split())
    for option in COMMANDS[name].params:
        text = option.help or ""
        # Text is wrapped at hyphens, too.
        assert re.sub(r"[\s-]", "", text) in re.sub(r"[\s-]", "", shown), option.name
        default = option.default
        if default is not None and default is not False and not option.required:
            assert re.search(rf"\[default: ?{re.escape(str(default))}[;\]]", shown), (option.name, default)
