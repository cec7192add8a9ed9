"""What is counted of a model is what a count by hand gives, and what its file turns out to have."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import qvit
from commands import run, sentence
from family_programs import FAMILIES
from pages import HOSTILE
from qvit.analysis.complexity import complexity
from qvit.bench import cost
from qvit.bench.compare import Comparison, Timing
from qvit.bench.cost import predicted_seconds, seconds_per_mac
from qvit.bench.random_model import random_model
from qvit.config import Bits
from qvit.errors import CheckpointError, ConfigError
from qvit.exporting.packed import export_checkpoint
from qvit.format.packed import packed_size, write_packed
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe
from qvit.runtime.engine import Engine
from qvit.study import complexity as study

# Of either model by its published sizes: width D, layers L, tokens N, classes K; MLPs are four times as wide.
K = 1000


def block(width: int) -> int:
    """Parameters of a transformer block but for position biases: two norms, qkv, projection, two layers of the MLP."""
    weights = 3 * width**2 + width**2 + 2 * 4 * width**2
    return weights + (3 + 1 + 4 + 1) * width + 2 * 2 * width


def test_deit_small_by_hand() -> None:
    D, L, N, patch = 384, 12, 197, 3 * 16 * 16
    counted = complexity("deit_small_patch16_224")
    assert counted.parameters == patch * D + D + D + N * D + L * block(D) + 2 * D + K * D + K == 22_050_664
    blocks = L * (N * (3 + 1 + 4 + 4) * D**2 + 2 * N * N * D)
    ends = (N - 1) * patch * D + K * D
    assert counted.operations.macs == {Bits(4, 4): blocks, Bits(8, 8): ends}
    assert counted.operations.float_equivalent == (4 * blocks + 8 * ends) / 32
    assert counted.float_size == 4 * counted.parameters


def test_swin_tiny_by_hand() -> None:
    depths, heads, window = (2, 2, 6, 2), (3, 6, 12, 24), 7
    parameters, blocks = 48 * 96 + 96 + 2 * 96, 0
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        width, tokens = 96 * 2**stage, (56 // 2**stage) ** 2
        if stage:  # four neighbours of half the width become one
            parameters += 2 * width * width + 2 * 2 * width
            blocks += tokens * 2 * width * width
        parameters += depth * (block(width) + (2 * window - 1) ** 2 * head)
        blocks += depth * (tokens * 12 * width**2 + 2 * tokens * window**2 * width)
    counted = complexity("swin_tiny_patch4_window7_224", qvit.QuantConfig(2, 3))
    assert counted.parameters == parameters + 2 * 768 + 768 * K + K == 28_288_354
    attention = sum(
        depth * 2 * (56 // 2**s) ** 2 * window**2 * 96 * 2**s for s, depth in enumerate(depths)
    )  # both factors are activations
    ends = 56**2 * 48 * 96 + 768 * K
    assert counted.operations.macs == {Bits(2, 3): blocks - attention, Bits(3, 3): attention, Bits(8, 8): ends}


SMALL = {"img_size": 32, "num_heads": 2}
CASES = {
    "vit": ("vit_tiny_patch16_224", {**SMALL, "patch_size": 8, "embed_dim": 26, "depth": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {**SMALL, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_size_of_a_quantized_checkpoint_is_that_of_its_file(tmp_path: Path, case: str) -> None:
    name, arguments = CASES[case]
    spec = describe(name, arguments, [*HOSTILE, "ordinary"], {})
    model = timm.create_model(name, num_classes=len(spec.classes), **arguments)
    config = qvit.QuantConfig(3, 4, overrides={"*.fc1": 5})
    student = qvit.quantize(model, config)
    qvit.calibrate(student, [torch.randn(2, 3, 32, 32)])
    spec = dataclasses.replace(spec, quant_config=config.to_dict(), metrics={"val_top1": 12.5})
    checkpoint, packed = tmp_path / "q.pt", tmp_path / "q.safetensors"
    write_checkpoint(checkpoint, spec, student)
    export_checkpoint(checkpoint, packed)

    counted, of_file = complexity(str(checkpoint)), complexity(str(packed))
    assert counted.file_size == of_file.file_size == packed.stat().st_size
    assert counted.operations == of_file.operations
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    folded = 26 if case == "vit" else -(2 * 8)  # the class token's position; merging has no bias, and 0 in the file
    assert counted.parameters - of_file.parameters == folded

    write_checkpoint(tmp_path / "float.pt", dataclasses.replace(spec, quant_config=None), model)
    same = complexity(str(tmp_path / "float.pt"), config)
    assert same.program == counted.program
    assert abs(same.file_size - counted.file_size) < 20  # how it was made, in the header
    for path, bits in ((checkpoint, config), (packed, config)):
        with pytest.raises(ConfigError, match="has its own bits: leave out --bits"):
            complexity(str(path), bits)
    with pytest.raises(ConfigError, match="leave out --image-size"):
        complexity(str(packed), None, 64)


def test_size_of_a_model_by_name_is_that_of_its_file_within_a_percent(tmp_path: Path) -> None:
    counted = complexity("deit_tiny_patch16_224.fb_in1k", qvit.QuantConfig(2))
    written = dataclasses.replace(random_model(counted.program), origin={"method": "random"})
    write_packed(tmp_path / "m.safetensors", written)
    assert counted.file_size == pytest.approx((tmp_path / "m.safetensors").stat().st_size, rel=0.01)
    assert complexity("deit_tiny_patch16_224", qvit.QuantConfig(2)).file_size == counted.file_size


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_every_family_have_the_size_that_is_told_and_run(tmp_path: Path, family: str) -> None:
    model = random_model(FAMILIES[family])
    write_packed(tmp_path / "m.safetensors", model)
    assert packed_size(dataclasses.replace(model, tensors={})) == (tmp_path / "m.safetensors").stat().st_size
    images = np.random.default_rng(0).standard_normal((1, *model.program.input), np.float32)
    outputs = Engine(model, threads=1)(images)
    assert np.isfinite(outputs).all()
    assert outputs.std() > 0


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("deit_smal_patch16_224", ConfigError, "did you mean deit_small_patch16_224"),
        ("deit_small_patch16_224.nope", ConfigError, "does not know deit_small_patch16_224.nope"),
        ("resnet50", ConfigError, "resnet50 is no model for qvit"),
        ("runs/q4/best.pt", CheckpointError, "There is no file runs/q4/best.pt"),
    ],
)
def test_what_is_no_model_is_refused(source: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        complexity(source)


def test_time_is_the_sum_of_what_each_multiply_add_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 1)
    widths = [Bits(2, 3), Bits(8, 8)]
    assert sorted(measured := seconds_per_mac(widths)) == widths
    assert all(1e-14 < seconds < 1e-6 for seconds in measured.values())
    program = complexity("deit_tiny_patch16_224").program
    (small, large) = program.macs().values()
    assert predicted_seconds(program, {Bits(4, 4): 2.0, Bits(8, 8): 3.0}) == 2.0 * small + 3.0 * large


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine take 2 ms, and PyTorch 14."""
    timings = [Timing("qvit", 1, 1, [2e-3]), Timing("PyTorch", 1, 1, [14e-3])]
    monkeypatch.setattr(study, "compare", lambda *args, **kwargs: Comparison(["qvit"], timings, {}, {}, {}))
    monkeypatch.setattr(study, "seconds_per_mac", lambda widths: dict.fromkeys(widths, 1e-12))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("timed")
def test_command_prints_exact_numbers_the_rule_and_the_claim() -> None:
    done = run("complexity", "deit_small_patch16_224", "--override", "*.fc1=4/8", "--measure")
    assert done.status == 0, done.err
    numbers = ("22,050,664", "88,202,656", "4,598,882,304", "98,684,583,936", "58,186,752")
    for text in (*numbers, "b/32", "6.14", "7.00", "2.00 ms", "+130%"):
        assert text in done.out
    assert re.search(r"^ *4 +8 +1,394,343,936 ", done.out, re.MULTILINE)  # 12 * 197 * 384 * 1536


@pytest.mark.usefixtures("timed")
def test_command_prints_the_papers_models_as_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(study.PAPER_MODELS) == ["DeiT-T", "DeiT-S", "DeiT-B", "Swin-T", "Swin-S", "Swin-B"]
    assert all(map(timm.is_model, study.PAPER_MODELS.values()))
    monkeypatch.setattr(study, "PAPER_MODELS", dict(list(study.PAPER_MODELS.items())[:2]))
    done = run("complexity", "--paper", "--bits", "2", "--measure")
    assert done.status == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if line.startswith(" DeiT-S")]
    counted = ["DeiT-S", "22.05", "88.20", "6.77", "4.541", "0.058", "0.298", "15.41"]
    assert rows == [counted, ["DeiT-S", "4.60", "2.00", "+130%", "14.0", "7.00"]]
    assert "6.14" in done.out


@pytest.mark.parametrize("arguments", [[], ["deit_tiny_patch16_224", "--paper"]])
def test_a_model_or_the_papers(arguments: list[str]) -> None:
    assert "Give a model, or --paper" in sentence(run("complexity", *arguments))
