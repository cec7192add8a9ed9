"""Two models on the same images by the command: what it prints and writes is what each of them gives alone."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import qvit
from commands import run, sentence
from pages import HOSTILE, check_page
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import open_validation
from qvit.errors import OutputError
from qvit.exporting.packed import export_checkpoint
from qvit.files import printable
from qvit.models.checkpoint import write_checkpoint
from qvit.models.packed_model import load_model
from qvit.models.spec import describe
from qvit.study import comparison
from qvit.train.evaluate import evaluate

CLASSES = ["a", "b", "c"]
ARGUMENTS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "ROUNDS", 2)


def checkpoint(
    path: Path, classes: list[str] = CLASSES, bits: int | None = None, seed: int = 0, **preprocessing: Any
) -> Path:
    """Write a small model with random weights."""
    torch.manual_seed(seed)
    channels = len(preprocessing.get("mean", (0, 0, 0)))
    arguments = {**ARGUMENTS, "in_chans": channels}
    spec = describe("vit_tiny_patch16_224", arguments, classes, preprocessing)
    model: Any = timm.create_model(spec.name, num_classes=len(classes), **arguments)
    if bits is not None:
        config = qvit.QuantConfig(bits, rectifier=None)
        model = qvit.quantize(model, config)
        qvit.calibrate(model, [torch.randn(4, channels, 16, 16)])
        spec = dataclasses.replace(spec, quant_config=config.to_dict())
    write_checkpoint(path, spec, model)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen pictures of each class."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(16):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def alone(path: Path, data: Path) -> float:
    """Return the accuracy of a model by itself."""
    model, spec = load_model(path)
    images = open_validation(str(data), spec.classes, mode=spec.mode)
    loader = make_loader(images, make_transform(spec.preprocessing), 64, shuffle=False)
    return evaluate(model, loader, torch.device("cpu")).top1


def test_each_model_has_its_own_accuracy_by_its_own_preprocessing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = {"mean": [0.4], "std": [0.2], "crop_pct": 1.0}
    quantized = checkpoint(tmp_path / "q.pt", bits=2, seed=1, **grey)
    export_checkpoint(quantized, packed := tmp_path / "q.safetensors")
    plain = checkpoint(tmp_path / "float.pt", crop_pct=0.8, interpolation="bilinear")
    for number, pair in enumerate(((plain, quantized), (packed, plain), (quantized, packed))):
        report = tmp_path / f"report-{number}"
        done = run("compare", *pair, "--data", pictures, "--report", report, "--batch-size", "10")
        assert done.status == 0, done.err
        told = json.loads((report / "report.json").read_text())
        assert [top1["percent"] for top1 in told["top1"]] == pytest.approx([alone(path, pictures) for path in pair])
        assert told["images"] == 48
        assert sum(told["right"].values()) == 48
        assert [model["file"] for model in told["models"]] == list(map(str, pair))
        assert all(model["seconds"] > 0 for model in told["models"])
        assert f"{told['top1'][0]['percent']:.2f} (" in done.out
        assert f"p = {told['p_value']:.3g} (McNemar" in done.out
        page = check_page((report / "report.html").read_text())
        kinds = {"A alone is right", "B alone is right", "Neither is right"}
        assert kinds <= {heading["text"] for heading in page.all("h2")}
        assert bool(page.all("img")) == (told["same"] < 48)
    assert told["models"][1]["bytes"] == packed.stat().st_size
    assert told["same"] == 48  # one model, in PyTorch and in the engine
    assert told["p_value"] == 1.0
    assert "report.html is there already" in sentence(run("compare", *pair, "--data", pictures, "--report", report))
    done = run("compare", *pair, "--data", pictures, "--report", packed)
    assert sentence(done).endswith(f": {packed} is no folder: give another name.")
    assert not done.out  # before the work

    def fail(*_: object) -> None:
        raise OutputError("Cannot write it.")

    monkeypatch.setattr("qvit.study.comparison_report.write_report", fail)  # after the record
    assert (
        sentence(run("compare", *pair, "--data", pictures, "--report", tmp_path / "half")) == "qvit: Cannot write it."
    )
    assert not list((tmp_path / "half").iterdir())


def test_pictures_without_labels_give_agreement_alone(tmp_path: Path, pictures: Path) -> None:
    pair = [checkpoint(tmp_path / f"{seed}.pt", seed=seed) for seed in (0, 1)]
    done = run("compare", *pair, "--images", pictures, "--report", tmp_path / "report")
    assert done.status == 0, done.err
    assert "of 48 images" in done.out
    assert "top-1" not in done.out
    page = check_page((tmp_path / "report" / "report.html").read_text())
    captions = [caption["text"] for caption in page.all("figcaption")]
    assert any(caption.startswith(("a/", "b/", "c/")) and " A says " in caption for caption in captions)


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    classes = sorted(name.replace("/", "|").replace("\x00", "") for name in HOSTILE)
    folder = tmp_path / "<b>\u202e&{{1}}"
    for name in classes:
        (folder / name).mkdir(parents=True)
        for shade in range(2):
            Image.new("RGB", (16, 16), (99 * shade, 0, 50)).save(folder / name / f"{shade}\u202e<i>.png")
    pair = [checkpoint(folder.with_name(f"<u>\u202e{seed}.pt"), classes, seed=seed) for seed in (3, 4)]
    done = run("compare", *pair, "--data", folder, "--report", tmp_path / "report")
    assert done.status == 0, done.err
    assert all(c.isprintable() or c == "\n" for c in done.out)
    page = check_page((tmp_path / "report" / "report.html").read_text())
    text = "\n".join(element["text"] for element in page.elements)
    assert printable(pair[0]) in text
    assert any(printable(f"\u202e<i>.png: is {name}, ") in text for name in classes)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, pictures: Path) -> None:
    first, second = checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", ["a", "c", "b"])
    assert "Class 1 is 'b' in" in sentence(run("compare", first, second, "--data", pictures))
    vectors = checkpoint(tmp_path / "v.pt", [])
    assert "has no classes to compare" in sentence(run("compare", first, vectors, "--data", pictures))
    for arguments in ([], ["--data", pictures, "--images", pictures]):
        assert "Give either --data" in sentence(run("compare", first, first, *arguments))
    assert "--data is empty" in sentence(run("compare", first, first, "--data", ""))
    (pictures / "a" / "3.png").write_bytes(b"")
    assert "3.png cannot be read" in sentence(run("compare", first, first, "--data", pictures))
    second = checkpoint(tmp_path / "c.pt", seed=5)
    done = run("compare", first, second, "--data", pictures, "--skip-corrupt", "--report", tmp_path / "report")
    assert "of 47 images" in done.out
    assert "skipped: 1" in done.out
    captions = [c["text"] for c in check_page((tmp_path / "report" / "report.html").read_text()).all("figcaption")]
    told = [re.match(r"(.)/\d+\.png: is (.), ", caption) for caption in captions if "png" in caption]
    assert told
    assert all(match[1] == match[2] for match in told if match)  # each is the image that it is said to be
