"""What a user's mistakes end in: one sentence that names them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import run, sentence
from conftest import MODEL


def images(folder: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 12) -> Path:
    """Write a ``train``/``val`` tree of 8 x 8 grey images, lighter from class to class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(60 * index, 60 * index + 60, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{n}.png")
    return folder


def test_unknown_model_names_the_nearest(tmp_path: Path) -> None:
    done = run("train", "vit_tinny_patch16_224", "--full-precision", "--data", "digits", "--out", tmp_path)
    assert re.search(r"vit_tinny_patch16_224.*did you mean .*vit_tiny_patch16_224", sentence(done))


def test_absent_folder_is_named(training: list[str], tiny_float: Path) -> None:
    assert "nowhere" in sentence(run(*training, "--teacher", tiny_float, "--data", "nowhere"))


def test_folder_without_images_is_named(training: list[str], tiny_float: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(*training, "--teacher", tiny_float, "--data", tmp_path / "empty")
    assert "empty holds no images" in sentence(done)


def test_corrupt_image_is_named(tiny_recipe: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    (folder / "train" / "a" / "5.png").write_bytes(b"\x89PNG, or not")
    arguments = ["train", MODEL, "--full-precision", "--recipe", tiny_recipe, "--set", "full_precision.batch_size=24"]
    done = run(*arguments, "--data", folder, "--out", tmp_path / "run")
    assert re.search(r"data/train/a/5\.png .*--skip-corrupt", sentence(done))


@pytest.mark.parametrize("method", ["ptq", "baseline"])
def test_corrupt_images_are_skipped_and_counted(tiny_recipe: Path, tmp_path: Path, method: str) -> None:
    folder = images(tmp_path / "data")
    for split in ("train", "val"):
        (folder / split / "a" / "5.png").write_bytes(b"\x89PNG, or not")
    arguments = ["--data", folder, "--recipe", tiny_recipe, "--skip-corrupt", "--set", "quantized.batch_size=24"]
    arguments += ["--set", "full_precision.batch_size=24", "--set", "full_precision.epochs=1"]
    done = run("train", MODEL, "--full-precision", *arguments, "--out", tmp_path / "float")
    assert done.status == 0, done.err
    assert "Unreadable images skipped: 2." in done.out
    quantized = tmp_path / "float" / "best.pt"
    done = run(
        "train", MODEL, "--bits", "4", "--method", method, *arguments, "--teacher", quantized, "--out", tmp_path / "q"
    )
    assert done.status == 0, done.err
    assert ", 23 validation images: " in done.out
    assert f"Unreadable images skipped: {1 if method == 'ptq' else 2}." in done.out
    done = run("eval", tmp_path / "q" / "best.pt", "--data", folder, "--skip-corrupt")
    assert "Unreadable images skipped: 1." in done.out
    assert "val/a/5.png" in sentence(run("eval", tmp_path / "q" / "best.pt", "--data", folder))


def test_teacher_of_other_classes_is_refused(training: list[str], tiny_float: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    done = run(*training, "--teacher", tiny_float, "--data", folder)
    assert re.search(r"teacher .*best\.pt has 10 classes, the data 2", sentence(done))
    done = run("eval", tiny_float, "--data", folder)
    assert "but a, b: its 2 classes must be the 10 of the checkpoint" in sentence(done)


@pytest.mark.parametrize("change", ["model_args.depth=3", "model_args.num_heads=3"])
def test_teacher_of_other_depth_or_heads_cannot_guide(
    training: list[str], tiny_recipe: Path, digit_folder: Path, tiny_float: Path, tmp_path: Path, change: str
) -> None:
    arguments = ["train", MODEL, "--full-precision", "--data", digit_folder, "--recipe", tiny_recipe, "--set", change]
    arguments += ["--set", "full_precision.batch_size=10"]
    done = run(*arguments, "--set", "full_precision.epochs=1", "--out", tmp_path / "other")
    assert done.status == 0, done.err
    other = tmp_path / "other" / "best.pt"
    done = run(*training, "--teacher", other, "--initial-model", tiny_float, "--method", "q-vit")
    what = "attention layers" if "depth" in change else "heads"
    assert f"the teacher has 3 {what}, the student 2. Use a teacher " in sentence(done)
    assert not (tmp_path / "run").exists()
    # Its labels alone are welcome.
    assert run(*training, "--teacher", other, "--initial-model", tiny_float, "--method", "baseline").status == 0


@pytest.mark.parametrize("bits", ["1", "9", "0", "-4"])
@pytest.mark.parametrize("option", ["--bits", "--activation-bits"])
def test_bits_outside_two_to_eight_are_refused(training: list[str], tiny_float: Path, option: str, bits: str) -> None:
    assert re.search(rf"2 to 8, not {bits}", sentence(run(*training, "--teacher", tiny_float, option, bits)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "magic"], "no method 'magic'"),
        (["--rectifier", "channel"], "head or token, not 'channel'"),
        (["--precision", "fp8"], "no or bf16, not 'fp8'"),
        (["--recipe", "mine.yaml"], "no recipe 'mine.yaml'"),
        (["--set", "quantized.epoch=3"], "did you mean 'epochs'"),
        (["--override", "head"], "PATTERN=BITS"),
        (["--override", "head=16"], "2 to 8, not 16"),
        (["--override", "blokcs.*=8"], "'blokcs.*' matches no layer of the model: did you mean 'blocks.*'"),
        (["--set", "quantized.optimizer=lmab"], "no optimizer 'lmab': did you mean lamb"),
        (["--set", "quantized.optimizer_args.bettas=[0,1]"], "did you mean 'betas'"),
        (["--teacher", "absent.pt"], "no file absent.pt"),
        (["--full-precision"], "leave out --bits"),
    ],
)
def test_wrong_value_is_named(training: list[str], tiny_float: Path, arguments: list[str], named: str) -> None:
    assert named in sentence(run(*training, "--teacher", tiny_float, *arguments))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--bits", "4,x"], "--bits takes whole numbers"),
        (["--bits", "9"], "2 to 8, not 9"),
        (["--seeds", "-1,2"], "--seeds must be at least 1"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--rows", "baseline,best"], "no row 'best'"),
        (["--bits", ""], "--bits"),
        (["--rows", ""], "--rows"),
        (["--override", "blokcs.*=8"], "'blokcs.*' matches no layer"),
    ],
)
def test_wrong_value_of_an_ablation_is_named(
    tiny_recipe: Path, tiny_float: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    base = [
        "ablate",
        MODEL,
        "--data",
        "digits",
        "--recipe",
        tiny_recipe,
        "--teacher",
        tiny_float,
        "--out",
        tmp_path / "t",
    ]
    assert named in sentence(run(*base, *arguments))
    assert not (tmp_path / "t").exists()


def test_full_precision_takes_no_option_of_quantization(tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = [
        "train",
        MODEL,
        "--full-precision",
        "--data",
        "digits",
        "--recipe",
        tiny_recipe,
        "--out",
        tmp_path / "run",
    ]
    done = run(*arguments, "--override", "blocks.*=8", "--activation-bits", "4")
    assert "leave out --activation-bits and --override" in sentence(done)


def test_student_without_a_float_model_says_how_to_make_one(training: list[str]) -> None:
    assert "--full-precision makes one" in sentence(run(*training))


def test_teacher_of_another_architecture_is_no_start(training: list[str], tiny_float: Path) -> None:
    done = run(*training, "--teacher", tiny_float, "--set", "model_args.depth=3")
    assert "'depth': 3" in sentence(done)


def test_damaged_checkpoint_is_named(tiny_float: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "half.pt"
    damaged.write_bytes(tiny_float.read_bytes()[:5000])
    assert "half.pt" in sentence(run("eval", damaged, "--data", "digits"))


@pytest.mark.parametrize("arguments", [["--colour", "red"], ["--bits", "four"]])
def test_wrong_flag_is_named(training: list[str], arguments: list[str]) -> None:
    done = run(*training, *arguments)
    assert done.status == 2
    assert arguments[0] in done.err
    assert "Traceback" not in done.err
