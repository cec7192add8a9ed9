"""qvit analyze from end to end: models of no training, folders with hostile names, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

import qvit
from commands import run, sentence
from members import student_of, vary
from pages import check_page
from qvit.analysis.bottleneck import PARTS
from qvit.analysis.examination import Examination
from qvit.errors import OutputError
from qvit.files import printable
from qvit.models.checkpoint import load_checkpoint, write_checkpoint
from qvit.models.spec import create_model, describe
from qvit.study import analysis, analysis_report

HOSTILE = ('"><script>alert(1)<', "\u202e😀 $x$ [b]'")
MODEL = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
RECIPE = """
model_args: {}
augmentation: {scale: [0.9, 1.0], ratio: [1.0, 1.0], hflip: 0.0, color_jitter: null, interpolation: bilinear}
quantized: {epochs: 1, batch_size: 8, lr: 2e-3, calibration_images: 8}
"""
FIGURES = {"query", "key", "layers", "heads", "maps-0", "noise-0", "parts", "blocks"}


@pytest.fixture
def checkpoints(tmp_path):
    """Return a maker of ``[float, 2 bits]`` with these classes and image size, in folders of hostile names."""

    def make(classes=HOSTILE, **changes):
        spec = describe(MODEL, {**ARGS, **changes}, sorted(classes), PREPROCESSING)
        torch.manual_seed(0)
        model = vary(create_model(spec)).eval()
        config = qvit.QuantConfig(2, 2)
        images = torch.randn(8, *spec.preprocessing["input_size"])
        paths = [tmp_path / "runs" / name / "best.pt" for name in HOSTILE]
        write_checkpoint(paths[0], spec, model)
        spec.quant_config, spec.method = config.to_dict(), "<b>ptq"
        write_checkpoint(paths[1], spec, student_of(model, images, config))
        return paths

    return make


@pytest.fixture
def undrawn(monkeypatch):
    """Leave figures as they are made, for drawing them takes seconds."""
    monkeypatch.setattr(analysis_report, "svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr(analysis_report, "png", lambda figure: b"")


def test_hostile_names_are_text_in_everything_that_is_written(checkpoints, image_folder, tmp_path):
    data, out = image_folder(classes=tuple(sorted(HOSTILE))), tmp_path / "out <i>"
    done = run("analyze", *checkpoints(), "--data", data, "--out", out, "--cpu", "--blocks", "0")
    assert done.status == 0, done
    text = (out / "report.html").read_text()
    result = json.loads((out / "analysis.json").read_text())
    page = check_page(text)
    named = [printable(f"{HOSTILE[0]}/best.pt"), printable(f"{HOSTILE[1]}/best.pt")]
    assert set(named) <= {cell["text"] for cell in page.all("td")}
    assert "<b>ptq" in {cell["text"] for cell in page.all("td")}
    assert {path.stem for path in (out / "figures").glob("*.svg")} == FIGURES
    assert {path.stem for path in (out / "figures").glob("*.png")} == FIGURES
    assert text.count("data:image/svg+xml;base64,") == len(FIGURES)
    assert list(result["models"]) == [f"{HOSTILE[0]}/best.pt", f"{HOSTILE[1]}/best.pt"]
    assert result["reference"] == f"{HOSTILE[0]}/best.pt"
    assert (result["images"], result["blocks"], result["study"]["bits"]) == (8, [0], 2)
    first, second = result["models"].values()
    assert first["top1"] == result["study"]["float_top1"]
    assert second["same_class"] <= 100
    assert len(second["layers"]) == 1
    assert "What is compared is compared with" in text
    assert "--override &#39;blocks." in text
    assert f"{second['top1']:.2f}" in done.out

    again = run("analyze", *checkpoints(), "--data", data, "--out", out, "--cpu")
    assert "report.html is there already: give another name, or move it away." in sentence(again)


def test_an_analysis_that_cannot_be_written_can_be_repeated(checkpoints, image_folder, tmp_path, undrawn, monkeypatch):
    def fail(*_):
        # What a second signal or a full memory ends here leaves what is there by now.
        assert not {"figures", "analysis.json"} & {path.name for path in out.iterdir()}
        raise OutputError("Cannot write it.")

    data, out = image_folder(classes=tuple(sorted(HOSTILE))), tmp_path / "out"
    command = ["analyze", checkpoints()[1], "--data", data, "--out", out, "--cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(analysis_report, "write_report", fail)
        assert sentence(run(*command)) == "qvit: Cannot write it."
    done = run(*command)
    assert done.status == 0, done


def test_pictures_without_labels_at_any_depth_and_a_teacher(checkpoints, tmp_path, undrawn):
    folder = tmp_path / "photos" / "deep" / "er"
    folder.mkdir(parents=True)
    for number in range(15):
        Image.new("RGB", (9, 8), (10 * number, 40, 200 - 10 * number)).save(folder / f"<script>{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    source, student = checkpoints()
    command = ["analyze", student, "--images", tmp_path / "photos", "--cpu", "--bits", "3", "--seed", "1"]
    out = tmp_path / "out"
    done = run(*command, "--teacher", source, "--out", out, "--skip-corrupt")
    assert done.status == 0, done
    result = json.loads((out / "analysis.json").read_text())
    assert result["reference"] == "teacher (best.pt)"
    assert result["images"] in (2, 3)  # a fifth of sixteen, one of which may be the broken one
    assert all("top1" not in model for model in result["models"].values())
    assert result["study"]["float_top1"] is None
    assert result["study"]["parts"]["everything"]["same_class"] <= 100

    alone = run(*command, "--out", tmp_path / "alone", "--skip-corrupt")
    assert alone.status == 0, alone
    result = json.loads((tmp_path / "alone" / "analysis.json").read_text())
    assert result["reference"] is result["study"] is None
    assert "No float model was among them" in (tmp_path / "alone" / "report.html").read_text()


def test_every_part_is_trained_with_one_budget(checkpoints, image_folder, tmp_path, monkeypatch, undrawn):
    (tmp_path / "r.yaml").write_text(RECIPE)
    data, out = image_folder(classes=("a", "b")), tmp_path / "out"
    float_model, _ = checkpoints(("a", "b"))
    parts = ("queries and keys", "everything")
    monkeypatch.setattr(analysis, "PARTS", {part: PARTS[part] for part in parts})
    command = ["analyze", float_model, "--data", data, "--cpu", "--train", tmp_path / "r.yaml", "--out", out]
    done = run(*command, "--bits", "2", "--set", "quantized.lr=1e-3")
    assert done.status == 0, done
    trained = json.loads((out / "analysis.json").read_text())["study"]["trained"]
    assert tuple(trained) == parts
    for part, folder in zip(parts, ("queries-and-keys", "everything"), strict=True):
        records = [json.loads(line) for line in (out / "trained" / folder / "metrics.jsonl").read_text().splitlines()]
        assert trained[part] == records[-1]["val_top1"]
    config = load_checkpoint(out / "trained" / "queries-and-keys" / "last.pt")[1].quant_config
    assert (config["weight_bits"], config["activation_bits"]) == (8, 8)
    operands = ("query", "key")
    assert config["overrides"] == {f"blocks.0.attn.{operand}_quantizer": [2, 2] for operand in operands}
    assert "it alone, trained, the rest at 8 bits" in (out / "report.html").read_text()
    (out / "report.html").unlink()  # as if it had been interrupted when all was trained
    (out / "analysis.json").unlink()
    shutil.rmtree(out / "figures")
    done = run(*command, "--bits", "2", "--set", "quantized.lr=1e-3")
    assert done.status == 0, done
    assert json.loads((out / "analysis.json").read_text())["study"]["trained"] == trained


def test_ctrl_c_ends_in_one_sentence_and_leaves_nothing(checkpoints, image_folder, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Examination, "add", interrupted)
    data, out = image_folder(classes=tuple(sorted(HOSTILE))), tmp_path / "out"
    done = run("analyze", *checkpoints(), "--data", data, "--out", out, "--cpu")
    assert sentence(done, 130) == "qvit: Interrupted; nothing is kept."
    assert not list(out.glob("*.*"))


def test_what_is_refused_is_refused_in_a_sentence(checkpoints, image_folder, tmp_path):
    data, out = image_folder(classes=tuple(sorted(HOSTILE))), tmp_path / "out"
    paths = checkpoints()
    copy = tmp_path / "other.pt"
    shutil.copy(paths[1], copy)
    other = checkpoints(patch_size=2)[0]
    shutil.move(other, tmp_path / "patch.pt")
    common = ["--out", out, "--cpu"]
    for arguments, said in (
        ([copy], "Give either --data, whose"),
        ([copy, "--data", data, "--images", data], "Give either --data, whose"),
        ([copy, "--images", ""], "--images is empty"),
        ([copy, copy, "--data", data], "is given twice"),
        ([copy, tmp_path / "patch.pt", "--data", data], "differ in their architecture"),
        ([copy, "--data", data, "--teacher", tmp_path / "patch.pt"], "what is compared is of one architecture"),
        ([copy, "--data", data, "--blocks", "2"], "There is no block 2: the attention layers are 0 to 0"),
        ([copy, "--data", data, "--blocks", "x"], "--blocks takes whole numbers"),
        ([copy, "--data", data, "--train", "digits"], "--train starts from a float model"),
        ([copy, "--images", data, "--train", "digits"], "--train needs labels"),
        ([copy, "--data", data, "--set", "a=1"], "--set changes the recipe of --train"),
        ([copy, "--data", data, "--train", "digits", "--study-images", "0"], "leave out --study-images 0"),
        ([copy, "--data", "digits"], "classes"),
        ([tmp_path / "none.pt", "--data", data], "none.pt"),
    ):
        assert said in sentence(run("analyze", *arguments, *common)), arguments
    assert not out.exists() or not list(out.glob("*.*"))
