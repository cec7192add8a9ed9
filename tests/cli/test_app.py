"""The commands end to end, on budgets of seconds, and what a user's mistakes end in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from commands import Run, run, sentence
from conftest import made_once
from qvit._version import __version__
from qvit.models.checkpoint import load_checkpoint, weights_checksum, write_checkpoint
from qvit.quantization.distill import DistillationLoss

MODEL = "vit_tiny_patch16_224"
RECIPE = """
model_args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 2, num_heads: 2}
preprocessing: {mean: [0.5], std: [0.5], crop_pct: 1.0, interpolation: bilinear}
augmentation: {scale: [0.9, 1.0], ratio: [1.0, 1.0], hflip: 0.0, color_jitter: null, interpolation: bilinear}
full_precision: {epochs: 3, batch_size: 64, lr: 4e-3, optimizer: adamw}
quantized: {epochs: 1, batch_size: 10, lr: 2e-3, optimizer_args: {eps: 1e-8}, calibration_images: 128, reconstruction_steps: 9}
"""  # noqa: E501


@pytest.fixture
def qvit() -> Run:
    """Return a runner of the command line in this process."""
    return run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A float model, made as a user makes one: by the command."""

    def train(out: Path) -> None:
        done = run("train", MODEL, "--full-precision", "--data", "digits", "--recipe", recipe, "--out", out)
        assert done.status == 0, done.err
        (out / "said").write_text(done.out)

    return made_once(tmp_path_factory, "teacher", train) / "best.pt"


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six of each digit, half of them to validate with."""

    def write(folder: Path) -> None:
        images, labels = load_digits(return_X_y=True)
        for digit in range(10):
            for n, image in enumerate(images[labels == digit][:6]):
                path = folder / ("train", "val")[n % 2] / str(digit) / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 255 / 16).astype(np.uint8).reshape(8, 8)).save(path)

    return made_once(tmp_path_factory, "subset", write)


@pytest.fixture
def student(recipe: Path, subset: Path, tmp_path: Path) -> list[str]:
    """Arguments of a two-bit training; a later option of the same name wins."""
    arguments = ["train", MODEL, "--data", str(subset), "--recipe", str(recipe), "--bits", "2"]
    return [*arguments, "--out", str(tmp_path / "run")]


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


def test_float_training_leaves_checkpoints_metrics_and_tensorboard(teacher: Path) -> None:
    folder = teacher.parent
    assert (folder / "last.pt").exists()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert list((folder / "tensorboard").glob("events.*"))


def test_the_last_line_tells_the_best_and_the_last_epoch_and_recommends_one(teacher: Path) -> None:
    folder = teacher.parent
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best, last = max(records, key=lambda record: record["val_top1"]), records[-1]
    told = [f"epoch {r['epoch']}, top-1 {r['val_top1']:.2f}, top-5 {r['val_top5']:.2f}" for r in (best, last)]
    sums = [weights_checksum(load_checkpoint(folder / name)[0])[:16] for name in ("best.pt", "last.pt")]
    assert (folder / "said").read_text().splitlines()[-1] == (
        f"full precision, 359 validation images: best {told[0]}, in {teacher} (take this one); last {told[1]}, in "
        f"{folder / 'last.pt'}; SHA-256 of the weights {sums[0]}... and {sums[1]}..."
    )
    for name, record in (("best.pt", best), ("last.pt", last)):
        assert load_checkpoint(folder / name)[1].metrics["val_top1"] == record["val_top1"]


def test_evaluation_repeats_what_training_measured(qvit: Run, teacher: Path) -> None:
    records = [json.loads(line) for line in (teacher.parent / "metrics.jsonl").read_text().splitlines()]
    best = max(records, key=lambda record: record["val_top1"])
    done = qvit("eval", teacher, "--data", "digits")
    assert done.status == 0, done.err
    assert f"{best['val_top1']:.2f}" in done.out
    assert f"{best['val_top5']:.2f}" in done.out
    assert "359" in done.out
    assert "32 (float)" in done.out


@pytest.mark.parametrize("method", ["q-vit", "baseline", "rectify", "distill", "reconstruct", "ptq"])
def test_every_method_trains_and_its_checkpoint_evaluates(
    qvit: Run, student: list[str], teacher: Path, subset: Path, tmp_path: Path, method: str
) -> None:
    done = qvit(*student, "--teacher", teacher, "--method", method, "--override", "blocks.0.*=4/8")
    assert done.status == 0, done.err
    printed = re.search(r", 30 validation images: .*top-1 (\d+\.\d\d), top-5 (\d+\.\d\d), in .*best\.pt", done.out)
    assert printed
    evaluated = qvit("eval", tmp_path / "run" / "best.pt", "--data", subset, "--batch-size", "20")
    assert evaluated.status == 0, evaluated.err
    assert {printed[1], printed[2]} <= set(re.findall(r"\b\d+\.\d\d\b", evaluated.out))
    files = ["best.pt"] if method in ("reconstruct", "ptq") else ["best.pt", "last.pt"]
    checksums = [weights_checksum(load_checkpoint(tmp_path / "run" / file)[0])[:16] for file in files]
    assert done.out.endswith(f"SHA-256 of the weights {' and '.join(f'{checksum}...' for checksum in checksums)}\n")
    assert "2/2" in evaluated.out


def test_training_without_a_teacher_starts_from_float_weights(qvit: Run, student: list[str], teacher: Path) -> None:
    done = qvit(*student, "--initial-model", teacher, "--method", "rectify", "--rectifier", "token", "--seed", "3")
    assert done.status == 0, done.err


def test_a_quantized_checkpoint_starts_a_model_of_other_bits(
    qvit: Run, student: list[str], teacher: Path, tmp_path: Path
) -> None:
    assert qvit(*student, "--teacher", teacher).status == 0
    quantized = tmp_path / "run" / "last.pt"
    fewer = [*student, "--bits", "3", "--out", tmp_path / "fewer", "--initial-model", quantized, "--teacher", teacher]
    done = qvit(*fewer, "--method", "baseline")
    assert done.status == 0, done.err
    assert "3 bits, QAT baseline" in done.out
    assert "a teacher must be a float one" in sentence(
        qvit(*student, "--teacher", quantized, "--out", tmp_path / "none")
    )


def test_a_checkpoint_of_the_same_bits_keeps_its_scales(
    qvit: Run, student: list[str], teacher: Path, tmp_path: Path
) -> None:
    assert qvit(*student, "--teacher", teacher, "--method", "baseline").status == 0
    quantized = tmp_path / "run" / "last.pt"
    done = qvit(
        *student, "--out", tmp_path / "again", "--initial-model", quantized, "--teacher", teacher, "--method", "ptq"
    )
    assert done.status == 0, done.err
    models = [load_checkpoint(path)[0] for path in (quantized, tmp_path / "again" / "best.pt")]
    assert len({weights_checksum(model) for model in models}) == 1


def test_resume_goes_on_and_a_second_start_is_refused(
    qvit: Run, student: list[str], teacher: Path, tmp_path: Path
) -> None:
    arguments = [*student, "--teacher", str(teacher), "--method", "baseline"]
    assert qvit(*arguments, "--resume").status == 2
    assert not (tmp_path / "run").exists()
    first = qvit(*arguments)
    assert first.status == 0, first.err
    assert "--resume" in sentence(qvit(*arguments))
    again = qvit(*arguments, "--resume")
    assert again.status == 0, again.err
    assert again.out.splitlines()[-1] == first.out.splitlines()[-1]


def test_post_training_quantization_is_not_overwritten(
    qvit: Run, student: list[str], teacher: Path, tmp_path: Path
) -> None:
    arguments = [*student, "--teacher", str(teacher), "--method", "ptq"]
    assert qvit(*arguments).status == 0
    assert "run/best.pt is there already: give another name" in sentence(qvit(*arguments, "--bits", "4"))


OTHERS = {
    "quantized.epochs 1, this one with quantized.epochs 2": ["--set", "quantized.epochs=2"],
    "quantized.lr 0.002, this one with quantized.lr 0.001": ["--set", "quantized.lr=1e-3"],
    "quantized.optimizer_args.betas not set, this one": ["--set", "quantized.optimizer_args.betas=[0.9, 0.99]"],
    "augmentation.hflip 0.0, this one with augmentation.hflip 0.5": ["--set", "augmentation.hflip=0.5"],
    "method q-vit, this one with method rectify": ["--method", "rectify"],
    "precision no, this one with precision bf16": ["--precision", "bf16"],
    "accumulate 1, this one with accumulate 2": ["--accumulate", "2"],
    "decode_once False, this one with decode_once True": ["--decode-once"],
    "seed 0, this one with seed 1": ["--seed", "1"],
    "of another model or another run": ["--bits", "3"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path, subset: Path, teacher: Path) -> list[str]:
    """The command of a run that is finished."""
    out = tmp_path_factory.mktemp("finished")
    arguments = ["train", MODEL, "--data", str(subset), "--recipe", str(recipe), "--bits", "2"]
    arguments += ["--teacher", str(teacher), "--out", str(out)]
    done = run(*arguments)
    assert done.status == 0, done.err
    return arguments


@pytest.mark.parametrize("named", OTHERS)
def test_a_resumed_run_has_the_same_settings(qvit: Run, finished: list[str], named: str) -> None:
    said = sentence(qvit(*finished, "--resume", *OTHERS[named]))
    assert named in said
    assert "another --out" in said


def test_a_resumed_run_has_the_same_teacher(qvit: Run, finished: list[str], teacher: Path, tmp_path: Path) -> None:
    model, spec = load_checkpoint(teacher)
    torch.nn.init.zeros_(model.norm.bias)
    write_checkpoint(tmp_path / "other.pt", spec, model)
    said = sentence(qvit(*finished, "--resume", "--teacher", tmp_path / "other.pt"))
    assert "last.pt is of a run with teacher " in said
    assert qvit(*finished, "--resume", "--workers", "1", "--save-every", "7").status == 0


def test_ablation_prints_a_table_and_keeps_finished_cells(
    qvit: Run, recipe: Path, subset: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    arguments = ["ablate", MODEL, "--data", subset, "--recipe", recipe, "--teacher", teacher, "--out", out]
    done = qvit(*arguments, "--bits", "4,2", "--seeds", "2", "--rows", "ptq,baseline")
    assert done.status == 0, done.err
    assert "post-training" in done.out
    assert "QAT baseline" in done.out
    cells = sorted(out.glob("*-bit/*/seed-*/result.json"))
    assert [str(cell.parent.relative_to(out)) for cell in cells] == [
        f"{bits}-bit/{row}/seed-{seed}" for bits in (2, 4) for row in ("baseline", "ptq") for seed in (0, 1)
    ]
    report = (out / "report.html").read_text()
    assert "QAT baseline" in report
    assert "full precision" in report
    written = {cell: cell.stat().st_mtime_ns for cell in cells}
    assert qvit(*arguments, "--bits", "4,2", "--seeds", "2", "--rows", "ptq,baseline").status == 0
    assert {cell: cell.stat().st_mtime_ns for cell in cells} == written


def test_unknown_model_names_the_nearest(qvit: Run, tmp_path: Path) -> None:
    done = qvit("train", "vit_tinny_patch16_224", "--full-precision", "--data", "digits", "--out", tmp_path)
    assert re.search(r"vit_tinny_patch16_224.*did you mean .*vit_tiny_patch16_224", sentence(done))


def test_absent_folder_is_named(qvit: Run, student: list[str], teacher: Path) -> None:
    assert "nowhere" in sentence(qvit(*student, "--teacher", teacher, "--data", "nowhere"))


def test_folder_without_images_is_named(qvit: Run, student: list[str], teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = qvit(*student, "--teacher", teacher, "--data", tmp_path / "empty")
    assert "empty holds no images" in sentence(done)


def test_corrupt_image_is_named(qvit: Run, recipe: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    (folder / "train" / "a" / "5.png").write_bytes(b"\x89PNG, or not")
    arguments = ["train", MODEL, "--full-precision", "--recipe", recipe, "--set", "full_precision.batch_size=24"]
    done = qvit(*arguments, "--data", folder, "--out", tmp_path / "run")
    assert re.search(r"data/train/a/5\.png .*--skip-corrupt", sentence(done))


@pytest.mark.parametrize("method", ["ptq", "baseline"])
def test_corrupt_images_are_skipped_and_counted(qvit: Run, recipe: Path, tmp_path: Path, method: str) -> None:
    folder = images(tmp_path / "data")
    for split in ("train", "val"):
        (folder / split / "a" / "5.png").write_bytes(b"\x89PNG, or not")
    arguments = ["--data", folder, "--recipe", recipe, "--skip-corrupt", "--set", "quantized.batch_size=24"]
    arguments += ["--set", "full_precision.batch_size=24", "--set", "full_precision.epochs=1"]
    done = qvit("train", MODEL, "--full-precision", *arguments, "--out", tmp_path / "float")
    assert done.status == 0, done.err
    assert "Unreadable images skipped: 2." in done.out
    quantized = tmp_path / "float" / "best.pt"
    done = qvit(
        "train", MODEL, "--bits", "4", "--method", method, *arguments, "--teacher", quantized, "--out", tmp_path / "q"
    )
    assert done.status == 0, done.err
    assert ", 23 validation images: " in done.out
    assert f"Unreadable images skipped: {1 if method == 'ptq' else 2}." in done.out
    done = qvit("eval", tmp_path / "q" / "best.pt", "--data", folder, "--skip-corrupt")
    assert "Unreadable images skipped: 1." in done.out
    assert "val/a/5.png" in sentence(qvit("eval", tmp_path / "q" / "best.pt", "--data", folder))


def test_teacher_of_other_classes_is_refused(qvit: Run, student: list[str], teacher: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    done = qvit(*student, "--teacher", teacher, "--data", folder)
    assert re.search(r"teacher .*best\.pt has 10 classes, the data 2", sentence(done))
    done = qvit("eval", teacher, "--data", folder)
    assert "10" in sentence(done)


@pytest.mark.parametrize("change", ["model_args.depth=3", "model_args.num_heads=3"])
def test_teacher_of_other_depth_or_heads_cannot_guide(
    qvit: Run, student: list[str], recipe: Path, subset: Path, teacher: Path, tmp_path: Path, change: str
) -> None:
    arguments = ["train", MODEL, "--full-precision", "--data", subset, "--recipe", recipe, "--set", change]
    arguments += ["--set", "full_precision.batch_size=10"]
    done = qvit(*arguments, "--set", "full_precision.epochs=1", "--out", tmp_path / "other")
    assert done.status == 0, done.err
    other = tmp_path / "other" / "best.pt"
    done = qvit(*student, "--teacher", other, "--initial-model", teacher, "--method", "q-vit")
    name = "layers" if "depth" in change else "heads"
    assert re.search(rf"2 .*{name}|{name}.* 2", sentence(done))
    assert "3" in sentence(done)
    assert not (tmp_path / "run").exists()
    # Its labels alone are welcome.
    assert qvit(*student, "--teacher", other, "--initial-model", teacher, "--method", "baseline").status == 0


@pytest.mark.parametrize("bits", ["1", "9", "0", "-4"])
@pytest.mark.parametrize("option", ["--bits", "--activation-bits"])
def test_bits_outside_two_to_eight_are_refused(
    qvit: Run, student: list[str], teacher: Path, option: str, bits: str
) -> None:
    assert re.search(rf"2 to 8, not {bits}", sentence(qvit(*student, "--teacher", teacher, option, bits)))


def test_nan_loss_stops_and_the_last_good_checkpoint_evaluates(
    qvit: Run, student: list[str], subset: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: DistillationLoss, *args: object) -> torch.Tensor:
        return original(self, *args) * (float("nan") if self.progress >= 0.6 else 1.0)

    original = DistillationLoss.forward
    monkeypatch.setattr(DistillationLoss, "forward", poisoned)
    arguments = [*student, "--teacher", str(teacher), "--method", "baseline", "--set", "quantized.epochs=2"]
    message = sentence(qvit(*arguments))
    assert "NaN" in message
    assert "epoch 2" in message
    assert "last.pt" in message
    done = qvit("eval", tmp_path / "run" / "last.pt", "--data", subset)
    assert done.status == 0, done.err


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
def test_wrong_value_is_named(qvit: Run, student: list[str], teacher: Path, arguments: list[str], named: str) -> None:
    assert named in sentence(qvit(*student, "--teacher", teacher, *arguments))


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
    qvit: Run, recipe: Path, teacher: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    base = ["ablate", MODEL, "--data", "digits", "--recipe", recipe, "--teacher", teacher, "--out", tmp_path / "t"]
    assert named in sentence(qvit(*base, *arguments))
    assert not (tmp_path / "t").exists()


def test_full_precision_takes_no_option_of_quantization(qvit: Run, recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", MODEL, "--full-precision", "--data", "digits", "--recipe", recipe, "--out", tmp_path / "run"]
    done = qvit(*arguments, "--override", "blocks.*=8", "--activation-bits", "4")
    assert "leave out --activation-bits and --override" in sentence(done)


@pytest.mark.parametrize("section", ["full_precision", "quantized"])
def test_a_recipe_needs_the_section_alone_that_the_run_uses(
    qvit: Run, recipe: Path, subset: Path, teacher: Path, tmp_path: Path, section: str
) -> None:
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(("full", "quant"))]
    lines.append(f"{section}: {{epochs: 1, batch_size: 10, lr: 4e-3}}")
    (tmp_path / "one.yaml").write_text("\n".join(lines))
    float_run = ["train", MODEL, "--full-precision", "--data", subset, "--recipe", tmp_path / "one.yaml"]
    few_bits = [
        "train",
        MODEL,
        "--bits",
        "4",
        "--teacher",
        teacher,
        "--data",
        subset,
        "--recipe",
        tmp_path / "one.yaml",
    ]
    table = ["ablate", MODEL, "--teacher", teacher, "--data", subset, "--recipe", tmp_path / "one.yaml"]
    runs = {"full_precision": [float_run], "quantized": [few_bits, table]}
    good = runs.pop(section)[0]
    done = qvit(*good, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    for other, commands in runs.items():
        for command in commands:
            said = sentence(qvit(*command, "--out", tmp_path / "none"))
            assert f"no {other}, which this run uses: add it with epochs, batch_size and lr" in said
    assert not (tmp_path / "none").exists()


def test_student_without_a_float_model_says_how_to_make_one(qvit: Run, student: list[str]) -> None:
    assert "--full-precision makes one" in sentence(qvit(*student))


def test_teacher_of_another_architecture_is_no_start(qvit: Run, student: list[str], teacher: Path) -> None:
    done = qvit(*student, "--teacher", teacher, "--set", "model_args.depth=3")
    assert "'depth': 3" in sentence(done)


def test_damaged_checkpoint_is_named(qvit: Run, teacher: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "half.pt"
    damaged.write_bytes(teacher.read_bytes()[:5000])
    assert "half.pt" in sentence(qvit("eval", damaged, "--data", "digits"))


@pytest.mark.parametrize("arguments", [["--colour", "red"], ["--bits", "four"]])
def test_wrong_flag_is_named(qvit: Run, student: list[str], arguments: list[str]) -> None:
    done = qvit(*student, *arguments)
    assert done.status == 2
    assert arguments[0] in done.err
    assert "Traceback" not in done.err


def test_absent_training_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'qvit'; from qvit.cli.app import main; main()"
    command = [sys.executable, "-c", code, "eval", "best.pt", "--data", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'qvit[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_packages() -> None:
    done = subprocess.run([sys.executable, "-m", "qvit.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qvit {__version__}\n"
