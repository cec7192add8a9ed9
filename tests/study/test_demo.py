"""The demo with a budget of seconds: every step, the table and the report."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import qvit
from commands import run, sentence
from pages import check_page
from qvit.study.demo import run_demo

CHANGES = [
    "model_args.patch_size=4",
    "full_precision.epochs=4",
    "full_precision.lr=4e-3",
    "full_precision.warmup_epochs=1",
    "quantized.epochs=1",
    "quantized.batch_size=128",
    "quantized.calibration_images=128",
    "quantized.reconstruction_steps=20",
]
TABLE_ROW = re.compile(
    r"^ *(4|2) +(post-training|reconstructed|QAT baseline|Q-ViT \(both\)) +(\d+\.\d\d) +\d\.\d\d of \1"
    r" +\d\.\d{3} +(\d+\.\d) +(\d+\.\d\d) +(\d+\.\d\d) +\d+\.\d\d *$",
    re.MULTILINE,
)


Demo = tuple[Path, str, list[tuple[str, ...]]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Folder, everything printed, and the table's rows of quantized models."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=80)
    threads = torch.get_num_threads()
    report = run_demo(out, console, changes=CHANGES)
    assert report == out / "report.html"
    assert torch.get_num_threads() == threads
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    rows = TABLE_ROW.findall(printed)
    assert len(rows) == 8, printed
    return out, printed, rows


def test_table_has_every_model_on_eighty_columns(demo: Demo) -> None:
    _, printed, rows = demo
    methods = ["post-training", "reconstructed", "QAT baseline", "Q-ViT (both)"]
    assert [(row[0], row[1]) for row in rows] == [(bits, method) for bits in ("4", "2") for method in methods]
    assert re.search(r"^ *32 +full precision +\d+\.\d\d +\d+\.\d +\d+\.\d\d *$", printed, re.MULTILINE)
    table = printed[printed.index("Handwritten digits") :]
    assert max(len(line.rstrip()) for line in table.splitlines() if "Report:" not in line) <= 80


def test_engine_agrees_with_the_fake_quantized_model(demo: Demo) -> None:
    for _, _, top1, _, engine_top1, agreement in demo[2]:
        assert float(agreement) >= 99.0
        assert float(engine_top1) == pytest.approx(float(top1), abs=1.0)


def test_packed_files_load_and_two_bits_are_smaller(demo: Demo) -> None:
    out, _, rows = demo
    for bits, method, *_ in rows:
        name = {
            "post-training": "ptq",
            "reconstructed": "reconstruct",
            "QAT baseline": "baseline",
            "Q-ViT (both)": "q-vit",
        }[method]
        engine = qvit.load(out / f"{name}-{bits}-bit.safetensors")
        assert engine.classes == [str(digit) for digit in range(10)]
    sizes = {(row[0], row[1]): float(row[3]) for row in rows}
    assert all(sizes["2", method] < sizes["4", method] for _, method in sizes)


def test_report_holds_table_curves_and_histograms(demo: Demo) -> None:
    out, _, rows = demo
    text = (out / "report.html").read_text()
    check_page(text)
    assert [f"<h2>{name}</h2>" in text for name in ("Result", "Training", "Queries", "How this was made")] == [True] * 4
    assert text.count("data:image/svg+xml;base64,") == 3  # curves, and histograms at 4 and at 2 bits
    for row in rows:
        assert f">{row[2]}</td>" in text
    assert "359 validation images" in text


def test_an_unfinished_demo_says_what_to_move_away(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()  # as a killed one leaves it
    said = f"qvit: {tmp_path / 'float'} is there already: give another name, or move {tmp_path} away."
    assert sentence(run("demo", "--out", tmp_path)) == said


def test_a_finished_demo_is_kept_and_its_report_named(demo: Demo) -> None:
    out = demo[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = run("demo", "--out", out)
    again = f"to run it again, move {out} away or give another --out"
    assert (done.status, done.out) == (0, f"The demo is finished. Report: {out / 'report.html'}; {again}.\n")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
