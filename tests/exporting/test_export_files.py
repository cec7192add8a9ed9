"""``qvit export`` by the suffix of the file that is asked for, and what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from commands import run, sentence
from conftest import TINY, make_vit
from forgery import take_apart
from members import CLASSES, VIT, images_for, student_of
from onnx_runs import session
from qvit import QuantConfig
from qvit.format.packed import read_packed
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe
from qvit.runtime.reference import ReferenceEngine
from test_import import WITHOUT_TORCH


def test_a_packed_model_becomes_onnx_without_pytorch(packed_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    code = WITHOUT_TORCH.format(blocked=["torch", "timm"]) + (
        f"sys.argv = ['qvit', 'export', {str(packed_file)!r}, {str(out)!r}, '--exact']\n"
        "from qvit.cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    packed, model = read_packed(packed_file), onnx.load(out)
    assert "MatMulInteger" in {node.op_type for node in model.graph.node}
    assert f"{out.stat().st_size / 1e6:.2f} MB" in done.stdout
    images = images_for(3, (16, 16)).numpy()
    expected = ReferenceEngine(packed)(images)
    np.testing.assert_allclose(session(model).run(None, {"images": images})[0], expected, atol=1e-4)


def test_a_checkpoint_becomes_onnx(tmp_path: Path) -> None:
    arguments = {name: value for name, value in TINY.items() if name != "num_classes"}
    student = student_of(make_vit(), images_for(3, (16, 16)), QuantConfig(2, 2))
    spec = dataclasses.replace(describe(VIT, arguments, CLASSES, {}), quant_config=QuantConfig(2, 2).to_dict())
    write_checkpoint(tmp_path / "q.pt", spec, student)
    for name in ("m.safetensors", "m.onnx"):
        done = run("export", tmp_path / "q.pt", tmp_path / name)
        assert done.status == 0, done.err
    through = run("export", tmp_path / "m.safetensors", tmp_path / "again.onnx")
    assert through.status == 0, through.err
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 25
    assert run("export", tmp_path / "q.pt", tmp_path / "old.onnx", "--opset", "21").status == 0
    assert onnx.load(tmp_path / "old.onnx").opset_import[0].version == 21


@pytest.mark.parametrize(
    ("source", "target", "more", "said"),
    [
        ("m.safetensors", "m.tflite", (), "m.tflite must end with .safetensors (a packed model) or .onnx."),
        ("m.safetensors", "", (), " must end with .safetensors (a packed model) or .onnx."),
        ("q.pt", "n.safetensors", ("--exact",), "--exact and --opset are for ONNX files: "),
        ("q.pt", "n.safetensors", ("--opset", "21"), "--exact and --opset are for ONNX files: "),
        ("m.safetensors", "n.safetensors", (), "m.safetensors is a packed model already: "),
        ("m.safetensors", "there.onnx", (), "there.onnx is there already: give another name, or move it away."),
        ("q.pt", "there.safetensors", (), "there.safetensors is there already: "),
        ("m.safetensors", "link.onnx", (), "link.onnx is there already: "),
        ("m.safetensors", "folder.onnx", (), "folder.onnx is there already: "),
        ("m.safetensors", "there.onnx/n.onnx", (), "there.onnx is no folder: give another name."),
        ("m.safetensors", "n.onnx", ("--opset", "26"), "opset must be a whole number from 21 to 25, not 26."),
        ("none.safetensors", "n.onnx", (), "There is no file "),
        ("none.pt", "n.onnx", (), "There is no file "),
        ("there.onnx", "n.onnx", (), "there.onnx was damaged, or is no file of PyTorch's"),
        ("later.safetensors", "n.onnx", (), "version is 3, this qvit reads 2: update qvit."),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_and_leaves_all_as_it_was(
    packed_file: Path, tmp_path: Path, source: str, target: str, more: tuple[str, ...], said: str
) -> None:
    (tmp_path / "m.safetensors").write_bytes(packed_file.read_bytes())
    later = take_apart(packed_file.read_bytes())
    later.header["version"] = 3
    (tmp_path / "later.safetensors").write_bytes(later.bytes())
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "link.onnx").symlink_to("nowhere")
    for name in ("there.onnx", "there.safetensors", "q.pt"):
        (tmp_path / name).write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    assert said in sentence(run("export", tmp_path / source, tmp_path / target, *more))
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "there.onnx").read_bytes() == b"x"


def test_without_onnx_the_extra_is_named(packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qvit.exporting.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)  # not to be found
    said = sentence(run("export", packed_file, tmp_path / "n.onnx"))
    assert said == "qvit: This command needs onnx: pip install 'qvit[onnx]' brings it."
