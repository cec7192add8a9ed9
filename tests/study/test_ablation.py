import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from qvit.config import QuantConfig
from qvit.data.sources import ImageSets
from qvit.errors import CheckpointError, ConfigError
from qvit.models.checkpoint import load_checkpoint, weights_checksum
from qvit.study import ablation
from qvit.study.ablation import ROWS, ablate, read_results, results_table, rows_named, summarise
from qvit.study.report import ablation_figures, write_ablation_report
from qvit.train import methods
from qvit.train.loop import read_metrics
from qvit.train.methods import FloatModel
from qvit.train.options import Options
from qvit.train.recipe import Recipe, load_recipe

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def budget() -> Recipe:
    changes = {"epochs": 1, "batch_size": 256, "calibration_images": 64, "reconstruction_steps": 5}
    return load_recipe("digits", [f"quantized.{name}={value}" for name, value in changes.items()])


def record(bits: int, row: str, seed: int, top1: float) -> dict[str, Any]:
    title = next(r.title for r in ROWS if r.name == row)
    figures = {"top5": 99.0, "images": 359, "query_entropy": 1.5, "key_entropy": 1.25, "attention_distance": 0.125}
    return {"bits": bits, "row": row, "title": title, "seed": seed, "top1": top1, **figures}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(bits: int, row: str, seed: int, top1: float = 80.0) -> Path:
        path = tmp_path / f"{bits}-bit" / row / f"seed-{seed}" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record(bits, row, seed, top1)))
        return path

    return to_file


def run(
    teacher: FloatModel, digits: ImageSets, recipe: Recipe, out: Path, rows: str, seeds: list[int], bits: list[int]
) -> list[dict[str, Any]]:
    console = Console(quiet=True)
    return ablate(teacher, digits, recipe, Options(out), console, bits=bits, seeds=seeds, rows=rows_named(rows))


def test_rows_are_the_papers_with_both_readings_of_irm() -> None:
    assert [row.name for row in ROWS] == [
        "ptq", "reconstruct", "baseline", "rectify-head", "rectify-token", "distill", "q-vit-head", "q-vit-token",
    ]  # fmt: skip
    assert rows_named(None) == ROWS
    assert [row.title for row in rows_named(" q-vit-token, ptq")] == ["Q-ViT (both), token", "post-training"]


@pytest.mark.parametrize("names", ["baseline,best", "", " , "])
def test_unknown_or_no_row_lists_the_known_ones(names: str) -> None:
    with pytest.raises(ConfigError, match="the rows are ptq, reconstruct, baseline, rectify-head"):
        rows_named(names)


def test_summary_is_mean_spread_and_gain_a_seed() -> None:
    runs = [("baseline", (80.0, 82.0, 87.0)), ("q-vit-head", (81.0, 84.0, 87.0)), ("ptq", (10.0, 20.0, 30.0))]
    records = [record(2, row, seed, top1) for row, values in runs for seed, top1 in enumerate(values)]
    baseline, qvit, ptq = summarise(records)
    assert (baseline["top1"], qvit["top1"], ptq["top1"]) == (83.0, 84.0, 20.0)
    assert (ptq["top1_std"], qvit["top1_std"]) == (10.0, 3.0)
    # Seed by seed the gains are 1, 2 and 0: their spread is smaller than that of either method.
    assert qvit["gain"] == 1.0
    assert qvit["gain_interval"] == pytest.approx(4.302653 / 3**0.5)  # t of two degrees of freedom
    assert baseline["gain"] is ptq["gain"] is None
    assert {summary["seeds"] for summary in (baseline, qvit, ptq)} == {3}


def test_gain_is_over_the_seeds_that_both_have() -> None:
    records = [record(2, "baseline", 0, 80.0), record(2, "distill", 0, 83.0), record(2, "distill", 1, 99.0)]
    _, distill = summarise(records)
    assert (distill["gain"], distill["gain_interval"], distill["top1"]) == (3.0, None, 91.0)


def test_bits_are_not_mixed() -> None:
    records = [record(4, "baseline", 0, 90.0), record(2, "distill", 0, 80.0)]
    assert [(s["bits"], s["gain"]) for s in summarise(records)] == [(4, None), (2, None)]


def test_table_shows_means_with_spreads(tmp_path: Path) -> None:
    records = [
        record(2, row, seed, 80.0 + seed + (row == "distill")) for row in ("baseline", "distill") for seed in (0, 2)
    ]
    console = Console(width=200, file=io.StringIO())
    console.print(results_table(records, 95.5))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "full precision: 95.50" in text
    assert "81.00 ± 1.41" in text
    assert "+1.00 ± 0.00" in text


def test_results_are_ordered_by_falling_bits_then_row_then_seed(write: Write, tmp_path: Path) -> None:
    for cell in ((2, "q-vit-head", 0), (4, "baseline", 1), (4, "baseline", 0), (4, "ptq", 0), (2, "baseline", 0)):
        write(*cell)
    assert [(r["bits"], r["row"], r["seed"]) for r in read_results(tmp_path)] == [
        (4, "ptq", 0), (4, "baseline", 0), (4, "baseline", 1), (2, "baseline", 0), (2, "q-vit-head", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bits": 2}', '{"row": "best"}', '{"row": "ptq"}'])
def test_damaged_result_is_named(write: Write, tmp_path: Path, text: str) -> None:
    path = write(2, "baseline", 0)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"seed-0/result\.json is damaged: remove it"):
        read_results(tmp_path)


def test_every_row_starts_from_the_teacher_and_leaves_it_alone(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe
) -> None:
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    records = run(teacher, digits, budget, tmp_path, "ptq,reconstruct,baseline,q-vit-token", [1], [8])
    assert [(r["row"], r["seed"], r["images"]) for r in records] == [
        ("ptq", 1, 359), ("reconstruct", 1, 359), ("baseline", 1, 359), ("q-vit-token", 1, 359),
    ]  # fmt: skip
    # At 8 bits a calibrated student is the float model to a few images, and its maps are the float model's.
    assert records[0]["top1"] == pytest.approx(teacher.spec.metrics["val_top1"], abs=1.0)
    assert records[0]["attention_distance"] < 0.02
    assert all(0 < r["query_entropy"] <= 8 and 0 < r["key_entropy"] <= 8 for r in records)
    assert all((value == before[name]).all() for name, value in teacher.model.state_dict().items())


def test_a_cell_that_was_cut_off_goes_on_and_finished_ones_are_kept(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ablation.train_quantized
    started: list[tuple[Path, bool]] = []

    def train_and_stop(*args: Any, **kwargs: Any) -> Any:
        options = next(argument for argument in args if isinstance(argument, Options))
        started.append((options.out, options.resume))
        result = train(*args, **kwargs)
        if len(started) == 2:
            raise KeyboardInterrupt  # trained, and not yet recorded
        return result

    monkeypatch.setattr(ablation, "train_quantized", train_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, digits, budget, tmp_path, "baseline", [0, 1], [2])
    records = run(teacher, digits, budget, tmp_path, "baseline", [0, 1], [2])
    assert [r["seed"] for r in records] == [0, 1]
    folder = tmp_path / "2-bit" / "baseline"
    assert started == [(folder / "seed-0", False), (folder / "seed-1", False), (folder / "seed-1", True)]
    assert len(read_metrics(folder / "seed-1")) == 1  # not trained a second time
    assert records[1]["top1"] == read_metrics(folder / "seed-1")[-1]["val_top1"]


def test_another_recipe_or_teacher_is_not_mixed_in(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe
) -> None:
    run(teacher, digits, budget, tmp_path, "ptq", [0], [2])
    longer = replace(budget, quantized=replace(budget.quantized, epochs=2))
    message = r"quantized.epochs 1, this one with recipe.quantized.epochs 2: give another --out"
    with pytest.raises(CheckpointError, match=message):
        run(teacher, digits, longer, tmp_path, "ptq", [0], [2])
    other = FloatModel(teacher.model, replace(teacher.spec, metrics={"val_top1": 1.0}))
    with pytest.raises(CheckpointError, match=r"teacher.metrics.val_images 359, teacher.metrics.val_top1 "):
        run(other, digits, budget, tmp_path, "ptq", [0], [2])
    console = Console(quiet=True)
    with pytest.raises(CheckpointError, match=r"overrides.\*.mlp.\* not set, this one with overrides.\*.mlp.\* 8"):
        ablate(
            teacher, digits, budget, Options(tmp_path), console, bits=[2], seeds=[0], overrides={"*.mlp.*": 8}
        )  # fmt: skip
    half = Options(tmp_path, precision="bf16")
    with pytest.raises(CheckpointError, match="precision no, this one with precision bf16"):
        ablate(teacher, digits, budget, half, console, bits=[2], seeds=[0], rows=rows_named("ptq"))
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"experiment\.json is damaged"):
        run(teacher, digits, budget, tmp_path, "ptq", [0], [2])


def test_a_ladder_starts_from_the_finished_run_of_the_bits_before(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ablation.train_quantized
    starts: list[FloatModel] = []

    def note(start: FloatModel, *args: Any, **kwargs: Any) -> Any:
        starts.append(start)
        return train(start, *args, **kwargs)

    monkeypatch.setattr(ablation, "train_quantized", note)
    console, rows = Console(quiet=True), rows_named("q-vit-head")
    ablate(
        teacher, digits, budget, Options(tmp_path), console, bits=[8, 4], seeds=[0], rows=rows, ladder=True
    )  # fmt: skip
    first, second = starts
    assert first is teacher
    finished, _ = load_checkpoint(tmp_path / "8-bit" / "q-vit-head" / "seed-0" / "last.pt")
    assert second.spec.quant_config is not None
    assert second.spec.quant_config["weight_bits"] == 8
    weights = finished.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in second.model.state_dict().items())
    # The student has its weights and rectifiers, and scales of its own.
    student = methods._student(second, QuantConfig(4, 4)).state_dict()
    for name, value in student.items():
        assert torch.equal(value, weights[name]) or "quantizer" in name, name
    with pytest.raises(CheckpointError, match=r"ladder \[8, 4\], this one with ladder None"):
        run(teacher, digits, budget, tmp_path, "q-vit-head", [0], [4])


def test_a_cell_that_another_command_is_at_is_left_to_it(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe
) -> None:
    folder = tmp_path / "2-bit" / "ptq" / "seed-0"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        records = run(teacher, digits, budget, tmp_path, "ptq", [0, 1], [2])
    assert [r["seed"] for r in records] == [1]
    assert [r["seed"] for r in run(teacher, digits, budget, tmp_path, "ptq", [0, 1], [2])] == [0, 1]


def test_a_record_tells_curve_layers_gradients_and_checksum(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe
) -> None:
    ptq, trained = run(teacher, digits, budget, tmp_path, "ptq,q-vit-head", [0], [2])
    assert ptq["history"] == []
    assert "gradients" not in ptq["layers"][0]
    assert [epoch["val_top1"] for epoch in trained["history"]] == [trained["top1"]]
    assert len(trained["layers"]) == 2
    assert all(layer["gradients"]["guided"] > 0 for layer in trained["layers"])
    mean = sum(layer["query_entropy"] for layer in trained["layers"]) / 2
    assert trained["query_entropy"] == pytest.approx(mean)
    model, _ = load_checkpoint(tmp_path / "2-bit" / "q-vit-head" / "seed-0" / "last.pt")
    assert trained["weights"] == weights_checksum(model)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1e-3
    assert trained["weights"] != weights_checksum(model)

    write_ablation_report(tmp_path / "report.html", [ptq, trained], 95.0)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<img") == 4
    assert f"{trained['top1']:.2f}" in text
    assert "In full precision the model reaches 95.00 %" in text
    names = [drawing.name for drawing in ablation_figures([ptq], ())]
    assert names == ["bars"]


def test_overrides_hold_in_every_run(tmp_path: Path, teacher: FloatModel, digits: ImageSets, budget: Recipe) -> None:
    ablate(
        teacher, digits, budget, Options(tmp_path), Console(quiet=True), bits=[2], seeds=[0], rows=rows_named("ptq"),
        overrides={"*.query_quantizer": 8, "blocks.*.mlp.*": (8, 2)},
    )  # fmt: skip
    model, _ = load_checkpoint(tmp_path / "2-bit" / "ptq" / "seed-0" / "best.pt")
    block: Any = model.blocks[0]
    assert (block.attn.query_quantizer.bits, block.attn.key_quantizer.bits) == (8, 2)
    assert (block.mlp.fc1.weight_quantizer.bits, block.attn.proj.weight_quantizer.bits) == (8, 2)
