"""``qvit predict`` and ``qvit eval`` on a packed file."""

from __future__ import annotations

import array
import io
import json
import mmap
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from commands import run, sentence
from family_programs import feature_program
from packed_models import random_packed
from qvit.errors import CorruptImageError
from qvit.format.packed import write_packed
from qvit.runtime.engine import load
from qvit.runtime.preprocess import preprocess_batch


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Return three images and, between them, one that is none."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("one.png", "two.jpg", "broken.jpg", "three.png")]
    for path in paths:
        if path.stem == "broken":
            path.write_bytes(b"no image")
        else:
            Image.fromarray(rng.integers(0, 255, (20, 31, 3), dtype=np.uint8)).save(path)
    return paths


def test_prints_the_probable_classes_of_each_image(packed_file: Path, photos: list[Path]) -> None:
    good = [path for path in photos if path.stem != "broken"]
    result = run("predict", packed_file, *good, "--top-k", "3")
    assert result.status == 0, result.err
    engine = load(packed_file)
    logits = engine(preprocess_batch(good, engine.preprocessing)).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = []
    for path, row in zip(good, shares, strict=True):
        expected.append(str(path))
        expected += [f"  {row[c]:7.2%}  class {c}" for c in np.argsort(-row)[:3]]
    assert result.out.splitlines() == expected


def test_json_holds_the_same(packed_file: Path, photos: list[Path]) -> None:
    result = run("predict", packed_file, photos[0], "--json", "--top-k", "20", "--threads", "1")
    assert result.status == 0, result.err
    (entry,) = json.loads(result.out)
    assert entry["image"] == str(photos[0])
    assert {found["name"] for found in entry["classes"]} == {f"class {n}" for n in range(10)}
    probabilities = [found["probability"] for found in entry["classes"]]
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True)


def test_bad_image_costs_the_others_nothing(packed_file: Path, photos: list[Path]) -> None:
    result = run("predict", packed_file, *photos)
    assert result.status == 2
    assert [line for line in result.out.splitlines() if line.startswith("/")] == [
        str(path) for path in photos if path.stem != "broken"
    ]
    (complaint,) = result.err.splitlines()
    assert complaint.startswith(f"qvit: {photos[2]} cannot be read as an image: ")

    entries = json.loads(run("predict", packed_file, *photos, "--json").out)
    assert [entry["image"] for entry in entries] == [str(path) for path in photos]
    assert [sorted(entry) for entry in entries] == [["classes", "image"]] * 2 + [
        ["error", "image"],
        ["classes", "image"],
    ]


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_model_that_is_none_is_one_sentence(tmp_path: Path, photos: list[Path], content: bytes | None) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-m", "qvit.cli", "predict", path, photos[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"qvit: .*model\.safetensors.*\.\n", done.stderr)


def test_starts_without_what_it_does_not_need(packed_file: Path, photos: list[Path]) -> None:
    code = f"""
import sys
sys.argv = ["qvit", "predict", {str(packed_file)!r}, {str(photos[0])!r}]
import qvit.cli.app
try:
    qvit.cli.app.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"numpy", "PIL", "qvit"} <= loaded
    assert not {"torch", "timm", "rich", "matplotlib", "scipy", "safetensors"} & loaded


def test_eval_measures_a_packed_file_as_it_does_a_checkpoint(tmp_path: Path, packed_file: Path) -> None:
    # Images that the engine itself classified, so that its accuracy on them is known.
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(60)]
    found = [best[0][0] for best in load(packed_file).predict(images, top_k=1)]
    for number in range(10):
        (tmp_path / "val" / f"class {number}").mkdir(parents=True)
        images[0].save(tmp_path / "val" / f"class {number}" / "every.png")
    for number, (image, name) in enumerate(zip(images, found, strict=True)):
        image.save(tmp_path / "val" / name / f"{number}.png")
    result = run("eval", packed_file, "--data", tmp_path, "--workers", "0", "--batch-size", "16")
    assert result.status == 0, result.err
    # All sixty, and of the ten copies of the first image the one in its own class.
    assert f"{100 * 61 / 70:.2f}" in result.out
    assert "4/4" in result.out


def test_eval_refuses_other_classes(packed_file: Path) -> None:
    assert "Class 0 is '0' in the data set digits" in sentence(run("eval", packed_file, "--data", "digits"))


def test_every_form_of_an_image_gets_the_same_prediction(packed_file: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    image = Image.fromarray(rng.integers(0, 255, (20, 31, 3), dtype=np.uint8))
    image.save(path, exif=exif)
    engine = load(packed_file)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    content = path.read_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        forms = [path, str(path), content, bytearray(content), io.BytesIO(content), file, Image.open(path), upright]
        forms += [memoryview(content), array.array("B", content), mapped]
        together = engine.predict(forms)
        alone = [engine.predict(form) for form in forms]
    assert together == [together[0]] * len(forms)
    assert alone == [[together[0]]] * len(forms)
    assert engine.predict(iter(forms[:3])) == together[:3]
    assert engine.predict([]) == []


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "source", [b"no image" * 10**6, "A" * 10**6, np.zeros((2, 3, 4, 5, 3), np.uint8), np.zeros((4, 5)), None, 7]
)
def test_what_is_no_image_is_one_sentence(packed_file: Path, source: Any, several: bool) -> None:
    good = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(CorruptImageError) as caught:
        load(packed_file).predict([good, source] if several else source)
    message = str(caught.value)
    assert len(message) < 800
    assert "\n" not in message
    if not isinstance(source, str):
        assert message.startswith(f"Image {int(several)} ({type(source).__name__}) cannot be read as an image: ")


def test_a_tensor_is_refused_in_a_sentence(packed_file: Path) -> None:
    with pytest.raises(
        CorruptImageError, match=r"Image 0 \(Tensor\) .*: give a path, bytes, a file open in binary mode"
    ):
        load(packed_file).predict(torch.zeros(1, 3, 16, 16))


def test_eval_of_images_none_of_which_can_be_read_is_no_result(packed_file: Path, tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"class {number}").mkdir()
        (tmp_path / f"class {number}" / "broken.png").write_bytes(b"no image")
    done = run("eval", packed_file, "--data", tmp_path, "--workers", "0", "--skip-corrupt")
    assert "No validation image can be read, so there is no accuracy." in sentence(done)
    assert done.out == ""


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed file without a classifier."""
    path = tmp_path_factory.mktemp("extractor") / "features.safetensors"
    write_packed(path, random_packed(feature_program()))
    return path


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_feature_extractor_has_no_classes_to_predict(
    extractor: Path, photos: list[Path], more: tuple[str, ...]
) -> None:
    done = run("predict", extractor, *photos, *more)
    assert sentence(done) == (
        "qvit: features is a feature extractor and has no classes: engine.embed(images) gives its vectors."
    )
    assert not done.out


def test_feature_extractor_has_no_accuracy(extractor: Path) -> None:
    said = sentence(run("eval", extractor, "--data", "digits"))
    assert said == f"qvit: {extractor} holds a feature extractor, which has no classes: there is no accuracy of it."


def test_info_and_bench_of_a_feature_extractor(extractor: Path) -> None:
    info = run("info", extractor)
    assert info.status == 0, info.err
    assert "none: a feature extractor" in info.out
    assert "a vector of" in info.out
    bench = run("bench", extractor, "--batch", "1", "--threads", "1", "--peers", "none", "--rounds", "1")
    assert bench.status == 0, bench.err
    assert "images/s" in bench.out
