"""qvit quantize end to end: what it writes, stopped and gone on with, and what a user's mistakes end in."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Done, run, sentence
from conftest import MODEL, make_vit, save_float
from edits import NONSENSE, edited, places
from qvit import load
from qvit.data.pictures import open_pictures
from qvit.errors import NonFiniteLossError, OutputError
from qvit.models.checkpoint import load_checkpoint, weights_checksum
from qvit.quantization.reconstruct import Reconstruction


def before_step(patch: pytest.MonkeyPatch, action: Callable[[int], object]) -> None:
    """Call ``action`` with its number, from 1, before every step that is made from now on."""
    numbers, original = itertools.count(1), Reconstruction._make_step

    def make_step(self: Reconstruction, learned: Any) -> float:
        action(next(numbers))
        return original(self, learned)

    patch.setattr(Reconstruction, "_make_step", make_step)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of thirty pictures of all kinds in folders of all kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(30):
        place = folder / ("a/b" if number % 2 else "c")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        kinds = [pixels, pixels[..., 0], pixels[..., 0].astype(np.uint16) * 256]
        Image.fromarray(kinds[number % 3]).save(place / f"{number}.png")
    return folder


@pytest.fixture
def quantize(float_file: Path, pictures: Path, tmp_path: Path) -> Callable[..., Done]:
    """Return the command with everything that it needs; a later option of the same name wins."""

    def command(*arguments: str | Path, source: str | Path = float_file) -> Done:
        out = tmp_path / "model.safetensors"
        given = ["--images", pictures, "--bits", "2", "--steps", "6", "--cpu", "--out", out, *arguments]
        return run("quantize", source, *given)

    return command


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reconstructed model be kept, which on these pictures is no better."""
    monkeypatch.setattr("qvit.study.quantization._is_worse", lambda first, second: False)


def checksum(path: Path) -> str:
    return weights_checksum(load_checkpoint(path)[0])


def test_pictures_become_a_packed_file_a_checkpoint_and_a_report(
    quantize: Callable[..., Done], tmp_path: Path, pictures: Path
) -> None:
    done = quantize("--report", tmp_path / "report")
    assert done.status == 0, done.err
    assert "same class as float" in done.out
    assert "6 steps (--steps 6 makes the same again)" in done.out
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (result["pictures"], result["held_out"], result["apart"]) == (24, 6, True)
    assert list(result["agreement"]) == ["calibrated", "reconstructed"]
    assert list(result["agreement"]["calibrated"]["blocks"]) == ["blocks.0", "blocks.1"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "blocks.1" in page
    assert "<img" in page
    model, spec = load_checkpoint(tmp_path / "model.pt")
    assert spec.quant_config is not None
    assert (spec.quant_config["weight_bits"], spec.quant_config["rectifier"]) == (2, None)
    assert spec.metrics["pictures"] == 6
    engine = load(tmp_path / "model.safetensors")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(engine(images.numpy()), model(images).numpy(), rtol=1e-3, atol=1e-3)
    assert (tmp_path / "model.safetensors").stat().st_size == result["bytes"]
    assert run("predict", tmp_path / "model.safetensors", next(pictures.rglob("*.png"))).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.safetensors", "report"]


@pytest.mark.usefixtures("kept")
def test_same_command_same_model_and_calibration_alone_is_another(
    quantize: Callable[..., Done], tmp_path: Path
) -> None:
    sums = []
    for number, more in enumerate([[], [], ["--seed", "1"]]):
        assert quantize("--out", tmp_path / f"{number}.safetensors", *more).status == 0
        sums.append(checksum(tmp_path / f"{number}.pt"))
    assert sums[0] == sums[1] != sums[2]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_calibration_alone(float_file: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    done = run("quantize", float_file, "--images", pictures, "--method", "calibrate", "--out", out, "--cpu")
    assert done.status == 0, done.err
    assert "reconstructed" not in done.out
    assert load_checkpoint(tmp_path / "model.pt")[1].method == "calibration, without labels"


def test_other_bits_are_told_by_quantize_and_compare(float_file: Path, pictures: Path, tmp_path: Path) -> None:
    out, report, others = tmp_path / "model.safetensors", tmp_path / "report", ["blocks.0.*=8", "*.mlp.fc2=2/4"]
    command = ["quantize", float_file, "--images", pictures, "--method", "calibrate", "--out", out, "--cpu"]
    done = run(*command, "--report", report, *(part for other in others for part in ("--override", other)))
    assert done.status == 0, done.err
    assert "4 bits, 2 overrides" in " ".join(done.out.split())  # the title of a narrow table is wrapped
    page = (report / "report.html").read_text()
    assert "Other bits, of weights and activations: blocks.0.* 8/8, *.mlp.fc2 2/4." in page
    compared = run("compare", tmp_path / "model.pt", out, "--images", pictures, "--cpu")
    assert compared.status == 0, compared.err
    assert compared.out.count("4/4 (2 overrides)") == 1  # of a packed file, the bits of most layers


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_stopped_goes_on_as_if_nothing_had_been(
    quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    steps: list[int] = []
    before_step(monkeypatch, steps.append)
    assert quantize("--out", tmp_path / "whole.safetensors").status == 0
    whole = len(steps)
    before_step(monkeypatch, lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    done = quantize()
    assert done.status == status
    assert "Stopped at step 3" in done.err
    assert "--resume goes on there" in done.err
    assert not (tmp_path / "model.safetensors").exists()
    assert run("export", tmp_path / "model.partial.pt", tmp_path / "as it is.safetensors").status == 0
    shutil.copy(tmp_path / "model.partial.pt", tmp_path / "model.partial.pt.copy")
    assert "unfinished reconstruction: give --resume" in sentence(quantize())
    assert quantize("--resume", "--report", tmp_path / "report").status == 0
    assert len(steps) == 2 * whole  # none was taken twice
    assert checksum(tmp_path / "model.pt") == checksum(tmp_path / "whole.pt")
    assert checksum(tmp_path / "model.pt") != checksum(tmp_path / "model.partial.pt.copy")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["steps"] == 6
    assert not (tmp_path / "model.partial.pt").exists()


@pytest.fixture
def partial(quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of a reconstruction that was stopped at its first step."""
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: os.kill(os.getpid(), signal.SIGINT))
        assert quantize().status == 130
    return tmp_path / "model.partial.pt"


def test_another_command_does_not_go_on_there(
    quantize: Callable[..., Done], partial: Path, float_file: Path, pictures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.pt"
    model = make_vit()
    with torch.no_grad():
        model.head.bias.add_(1.0)  # type: ignore[union-attr, operator]
    save_float(other, model)
    copied = tmp_path / "pictures"
    shutil.copytree(pictures, copied)
    Image.new("RGB", (20, 24)).save(next(copied.rglob("1.png")))
    assert "is of another model or of other bits" in sentence(quantize("--resume", "--bits", "3"))
    for changes, what in (
        (["--steps", "7"], "steps"),
        (["--pictures", "10"], "pictures"),
        (["--held-out", "3"], "pictures, pictures held out"),
        (["--images", copied], "pictures"),
        (["--seed", "1"], "seed"),
    ):
        assert "is of a command that differs in " in (said := sentence(quantize("--resume", *changes)))
        assert what in said
    assert "differs in teacher" in sentence(quantize("--resume", source=other))
    calibration = ["--images", pictures, "--out", tmp_path / "model.safetensors", "--method", "calibrate"]
    assert "leave out --resume" in sentence(run("quantize", float_file, *calibration, "--resume"))
    assert partial.exists()


@pytest.mark.usefixtures("kept")
def test_what_goes_wrong_after_the_last_step_loses_nothing(
    quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a file of the name of the output, which appears meanwhile."""
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: (tmp_path / "model.safetensors").write_text("precious"))
        assert "is there already" in sentence(quantize())
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    (tmp_path / "model.safetensors").unlink()
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: pytest.fail("a step is taken again"))
        done = quantize("--resume")
    assert done.status == 0, done.err
    assert quantize("--out", tmp_path / "whole.safetensors").status == 0
    assert checksum(tmp_path / "model.pt") == checksum(tmp_path / "whole.pt")


@pytest.mark.usefixtures("kept")
def test_a_packed_file_that_cannot_be_written_leaves_no_checkpoint_in_the_way(
    quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutputError("Cannot write it.")

    with monkeypatch.context() as patch:
        patch.setattr("qvit.study.quantization.export", fail)
        assert sentence(quantize("--steps", "1")) == "qvit: Cannot write it."
    assert quantize("--steps", "1", "--resume").status == 0


def test_two_commands_do_not_write_one_file(
    quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    before_step(monkeypatch, lambda step: said.append(sentence(quantize("--seed", "5"))) if step == 1 else None)
    assert quantize().status == 0
    assert "Another command is writing" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.safetensors"]


def test_what_cannot_be_written_is_found_out_first(
    quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Reconstruction, "_make_step", lambda self, learned: pytest.fail("it began"))
    for arguments, why in (
        (["--out", tmp_path / "file" / "model.safetensors"], f"{tmp_path / 'file'} is no folder: give another name."),
        (["--out", tmp_path / f"{'x' * 300}.safetensors"], "File name too long"),
        (["--report", tmp_path / "file"], f"{tmp_path / 'file'} is no folder: give another name."),
    ):
        assert why in sentence(quantize(*arguments))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("precious")
    assert "report.json is there already" in sentence(quantize("--report", tmp_path / "report"))
    same = ["--out", tmp_path / "new" / "report.json", "--report", tmp_path / "new"]
    assert "would be written twice: give two names." in sentence(quantize(*same))
    for option in ("--out", "--images"):
        assert "is empty" in sentence(quantize(option, ""))
    assert "--out '.' is no name of a file: give one such as " in sentence(quantize("--out", "."))


def test_a_loss_without_end_leaves_the_calibrated_model(
    quantize: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Reconstruction, learned: Any) -> float:
        raise NonFiniteLossError("The loss of the reconstruction became NaN.")

    monkeypatch.setattr(Reconstruction, "_make_step", fail)
    done = quantize()
    assert done.status == 0
    assert "became NaN" in done.out
    assert load_checkpoint(tmp_path / "model.pt")[1].method == "calibration, without labels"


def test_an_edited_file_is_a_sentence(quantize: Callable[..., Done], partial: Path) -> None:
    content = torch.load(partial, weights_only=True)
    rng = np.random.default_rng(0)
    every = [path for path in places(content) if path[:1] == ("training",)]
    for _ in range(12):
        path = every[rng.integers(len(every))]
        how = ("drop", "rename", "resize", "retype")[rng.integers(4)]
        torch.save(edited(content, path, how, NONSENSE[rng.integers(len(NONSENSE))]), partial)
        done = quantize("--resume")
        assert "Traceback" not in done.err
        assert done.status in (0, 2), (path, how, done)
        if done.status == 2:
            sentence(done)
        else:
            for written in ("model.pt", "model.safetensors"):
                partial.with_name(written).unlink()


def test_nothing_that_was_there_is_lost(quantize: Callable[..., Done], tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        (tmp_path / name).write_text("precious")
        assert f"{tmp_path / name} is there already: give another name" in sentence(quantize())
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    assert "There is no" in sentence(quantize("--resume"))
    assert "call it x.safetensors" in sentence(quantize("--out", tmp_path / "x.pt"))


def test_a_reconstruction_that_makes_it_worse_is_not_kept(
    quantize: Callable[..., Done], float_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Reconstruction._make_step

    def spoil(self: Reconstruction, learned: Any) -> float:
        loss = original(self, learned)
        with torch.no_grad():
            self.student.head.weight.mul_(1.0 if self.step else -1.0)  # type: ignore[union-attr, operator]
        return loss

    monkeypatch.setattr(Reconstruction, "_make_step", spoil)
    done = quantize("--report", tmp_path / "report")
    assert "the calibrated model was kept" in done.out
    assert "holds the calibrated model" in (tmp_path / "report" / "report.html").read_text()
    budget = ("--bits", "2", "--method", "calibrate", "--cpu")
    other = tmp_path / "other.safetensors"
    assert run("quantize", float_file, "--images", pictures, *budget, "--out", other).status == 0
    assert checksum(tmp_path / "model.pt") == checksum(tmp_path / "other.pt")


def open_held_out(folder: Path, seed: int) -> Any:
    return open_pictures(folder, "RGB", count=9, held_out=256, seed=seed).held_out.sources


def test_pictures_that_cannot_be_read_are_named(quantize: Callable[..., Done], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"no picture")
    assert "at least one image" in sentence(quantize("--images", folder, "--skip-corrupt"))
    for number in range(4):
        Image.new("RGB", (9, 9)).save(folder / f"{number}.png")
    assert "bad.png" in sentence(quantize("--images", folder))
    done = quantize("--images", folder, "--skip-corrupt")
    assert done.status == 0
    assert "skipped: 1" in done.out
    held_out_is_bad = next(seed for seed in range(30) if "bad" in str(open_held_out(folder, seed)))
    more = ["--out", tmp_path / "m.safetensors", "--seed", str(held_out_is_bad)]
    assert quantize("--images", folder, "--skip-corrupt", *more).status == 0


def test_one_picture_is_enough_and_said(quantize: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "1.png")
    done = quantize("--images", tmp_path / "one")
    assert done.status == 0
    assert "nothing could be held out" in done.out


def test_weights_alone_need_the_name_of_their_model(quantize: Callable[..., Done], tmp_path: Path) -> None:
    import timm

    path = tmp_path / "weights.pth"
    torch.save({"model": timm.create_model("test_vit", num_classes=7).state_dict()}, path)
    assert "does not say of which model: name it (--model)" in sentence(quantize(source=path))
    done = quantize("--model", "test_vit", "--steps", "1", "--pictures", "2", "--held-out", "1", source=path)
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "model.pt")[1].classes == [f"LABEL_{n}" for n in range(7)]


def test_what_cannot_be_meant_is_a_sentence(
    quantize: Callable[..., Done], float_file: Path, pictures: Path, tmp_path: Path
) -> None:
    assert quantize().status == 0
    other = ("--out", tmp_path / "x.safetensors")
    assert "holds a quantized model" in sentence(quantize(*other, source=tmp_path / "model.pt"))
    assert "leave out --model" in sentence(quantize(*other, "--model", MODEL))
    assert "There is no folder" in sentence(quantize(*other, "--images", tmp_path / "none"))
    assert "from 2 to 8" in sentence(quantize(*other, "--bits", "9"))
    assert "did you mean 'blocks.*'" in sentence(quantize(*other, "--override", "blokcs.*=8"))
    assert "Give either" in sentence(quantize(*other, "--minutes", "1"))
    assert "must be reconstruct or calibrate" in sentence(quantize(*other, "--method", "qat"))
    assert "has no budget" in sentence(quantize(*other, "--method", "calibrate"))
    assert "did you mean vit_tiny_patch16" in sentence(quantize(*other, source="vit_tiny_patch16_18"))
    assert not (tmp_path / "x.safetensors").exists()


def test_a_block_that_gives_infinities_is_named(quantize: Callable[..., Done], tmp_path: Path) -> None:
    model = make_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(3e38)  # type: ignore[index, union-attr, operator]
    path = save_float(tmp_path / "float.pt", model)
    assert "a NaN or an infinity at blocks.1.mlp.fc2.input_quantizer" in sentence(quantize(source=path))
