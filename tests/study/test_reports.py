"""Reports of every kind hold the names that users and files give as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pages import HOSTILE, check_page
from qvit.files import printable
from qvit.study.quantization_report import write_quantization_report
from qvit.study.report import write_ablation_report

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", HOSTILE)
def test_ablation(tmp_path: Path, name: str) -> None:
    lines = (ROOT / "docs" / "study" / "cpu.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    path = tmp_path / "report.html"
    write_ablation_report(path, [{**record, "title": name, "history": []}], 70.0)
    assert printable(name) in {cell["text"] for cell in check_page(path.read_text()).all("td")}


@pytest.mark.parametrize("name", HOSTILE)
def test_quantization(tmp_path: Path, name: str) -> None:
    measured = {"same_class": 90.0, "cosine": 0.9, "blocks": {name: 0.1, "blocks.1": 0.2}}
    told = {"pictures": 8, "held_out": 2, "bytes": 10, "float_bytes": 60, "seconds": 9.0, "seed": 0, "apart": True}
    names = {"model": name, "source": name, "method": name, "checksum": "0" * 64, "kept": "calibrated"}
    path = tmp_path / "report.html"
    result = {**told, **names, "bits": (4, 4), "overrides": {name: [8, 8]}, "agreement": {"calibrated": measured}}
    write_quantization_report(path, result)
    page = check_page(path.read_text())
    assert printable(name) in {cell["text"] for cell in page.all("td")}
    assert page.all("h1")[0]["text"] == f"{printable(name)} at 4 bits, without labels"
