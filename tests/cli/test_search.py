"""qvit search-bits end to end: what it writes, who takes it, and what a user's mistakes end in."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Done, run, sentence
from conftest import MODEL, TINY, make_vit, save_float
from members import CLASSES
from pages import check_page
from qvit import QuantConfig, export, quantize
from qvit import calibrate as calibrate_student
from qvit.cli.options import parse_overrides
from qvit.errors import ConfigError, OutputError
from qvit.format.packed import read_packed
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe
from qvit.quantization import calibrate
from qvit.search import find, timing
from qvit.search.products import CANDIDATES
from qvit.search.timing import Stopwatch, Times


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def search(float_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Return the command with everything but a budget; a later option of the same name wins."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(find, "_FRONTIER", 3)
    monkeypatch.setattr(calibrate, "_FRACTIONS", (1.0, 0.7))  # of the ranges that are tried; quick

    def command(*arguments: str | Path, source: str | Path = float_file) -> Done:
        given = ["--images", pictures, "--out", tmp_path / "bits.txt", "--threads", "1", "--cpu", *arguments]
        return run("search-bits", source, *given)

    return command


def test_bits_are_found_within_the_budgets_and_taken_by_quantize(
    search: Callable[..., Done], float_file: Path, pictures: Path, tmp_path: Path
) -> None:
    found = tmp_path / "my bits.txt"
    done = search("--budget-mb", "0.012", "--budget-bops", "0.005", "--report", tmp_path / "report", "--out", found)
    assert done.status == 0, done.err
    assert f"@{found}" in shlex.split(done.out.splitlines()[-1])  # can be pasted
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    costs = record["model"]["costs"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert len(check_page(page).all("img")) > 0
    assert "blocks.1.mlp.fc2" in page
    assert [model["title"] for model in record["uniform"]] == ["2 bits", "3 bits", "4 bits", "8 bits"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my bits.txt", "report"]

    out = tmp_path / "model.safetensors"
    options = ["--override", f"@{found}", "--bits", "8", "--method", "calibrate", "--cpu", "--out", out]
    assert run("quantize", float_file, "--images", pictures, *options).status == 0
    model = read_packed(out)
    size = sum(array.nbytes for array in model.tensors.values())
    operations = sum(
        product.macs * product.bits.weight * product.bits.activation for product in model.program.products()
    )
    assert (size, operations) == (round(costs["mb"] * 1e6), round(costs["bops"] * 1e9))
    assert size <= 12_000
    assert operations <= 5_000_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Give a budget: --budget-mb, --budget-bops or --budget-ms"),
        (["--budget-mb", "0"], "--budget-mb must be a number above 0, not 0.0."),
        (["--budget-ms", "nan"], "--budget-ms must be a number above 0, not nan."),
        (["--budget-mb", "0.001"], "No bits keep --budget-mb 0.001: the least of a model is 0.0"),
        (["--budget-ms", "1e-9", "--budget-mb", "1"], "of a model that keeps --budget-mb is 1 ms"),
        (["--budget-mb", "1", "--images", ""], "--images is empty"),
        (["--budget-mb", "1", "--images", "nowhere"], "There is no folder nowhere"),
        (["--budget-mb", "1", "--out", "."], "--out is no name of a file"),
        (["--budget-mb", "1", "--report", "r", "--out", "r/report.json"], "would be written twice: give two names."),
    ],
)
def test_what_cannot_be_meant_is_refused(
    search: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.setattr(Stopwatch, "times", functools.partialmethod(times, longer=0.0))
    assert told in sentence(search(*arguments))
    assert not (tmp_path / "bits.txt").exists()


def times(stopwatch: Stopwatch, report: object, longer: float) -> Times:
    """Return what a clock measures for which each product takes ``longer`` milliseconds than with 8 bits, of one."""
    by_bits = dict.fromkeys(CANDIDATES, longer)
    return Times(1.0, {product.name: by_bits for product in stopwatch.products}, 1, "portable")


def test_no_budget_is_of_times_that_cannot_be(search: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "times", functools.partialmethod(times, longer=-1.0))
    assert "no --budget-ms means anything" in sentence(search("--budget-ms", "1"))


def test_the_least_that_a_refusal_tells_is_enough_for_one_picture_too_and_nothing_is_replaced(
    search: Callable[..., Done], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes((pictures / "0.png").read_bytes())
    least = sentence(search("--budget-bops", "1e-5")).split(" is ")[1].split()[0]
    folder = "--images", tmp_path / "one"
    assert search("--budget-bops", least, *folder).status == 0
    # Layers and operands of two blocks; rounding up left room for nothing.
    assert list(parse_overrides([f"@{tmp_path / 'bits.txt'}"]).values()) == [2] * 16
    assert "is there already" in sentence(search("--budget-bops", least, *folder))


def test_a_search_that_cannot_be_written_leaves_nothing_in_the_way(
    search: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OutputError("Cannot write it.")

    monkeypatch.setattr("qvit.search.run.write_text", fail)  # after the page
    assert sentence(search("--budget-mb", "1", "--report", tmp_path / "report")) == "qvit: Cannot write it."
    assert not list((tmp_path / "report").iterdir())


def test_a_link_that_leads_nowhere_is_not_replaced(search: Callable[..., Done], tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to("nowhere")
    assert "is there already" in sentence(search("--budget-mb", "1", "--out", link))
    assert link.is_symlink()


def test_nothing_is_written_before_all_is_done(
    search: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Stopwatch, bits: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stopwatch, "_compare", interrupt)
    done = search("--budget-mb", "1", "--report", tmp_path / "report")
    assert (done.status, done.err) == (130, "qvit: Interrupted.\n")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_no_float_model_is_refused(search: Callable[..., Done], tmp_path: Path) -> None:
    student = quantize(make_vit(), QuantConfig(4, rectifier=None))
    spec = describe(MODEL, {name: value for name, value in TINY.items() if name != "num_classes"}, CLASSES, {})
    spec.quant_config = QuantConfig(4, rectifier=None).to_dict()
    write_checkpoint(tmp_path / "q.pt", spec, student)
    assert "a teacher must be a float one" in sentence(search("--budget-mb", "1", source=tmp_path / "q.pt"))
    calibrate_student(student, [torch.randn(2, 3, 16, 16)])
    export(student, tmp_path / "q.safetensors", preprocessing=spec.preprocessing, classes=CLASSES)
    packed = search("--budget-mb", "1", source=tmp_path / "q.safetensors")
    assert "is a packed model, which is quantized" in sentence(packed)
    assert "Argument 2 is empty" in sentence(search("--budget-mb", "1", source=""))


def test_pictures_that_cannot_be_read_are_named(search: Callable[..., Done], tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.name != "3.png" else b"nothing")
    assert "3.png" in sentence(search("--budget-mb", "1", "--images", folder))
    done = search("--budget-mb", "1e-5", "--images", folder, "--skip-corrupt")
    assert "No bits keep" in sentence(done)  # read, and gone on with
    assert "skipped: 1" in done.out


def test_a_model_that_gives_no_numbers_is_refused_by_the_layer(search: Callable[..., Done], tmp_path: Path) -> None:
    model = make_vit()
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp.fc1").weight[0, 0] = float("nan")
    assert "blocks.1.mlp" in sentence(search("--budget-mb", "1", source=save_float(tmp_path / "nan.pt", model)))


def test_overrides_come_from_files_and_arguments_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "bits.txt"
    path.write_text("# where from\n\nblocks.*=3\n  blocks.0.attn.qkv=2/4\n")
    assert parse_overrides([f"@{path}", "head=4"]) == {"blocks.*": 3, "blocks.0.attn.qkv": (2, 4), "head": 4}
    assert list(parse_overrides([f"@{path}", "blocks.*=2"])) == ["blocks.0.attn.qkv", "blocks.*"]  # the last one wins
    for text in ("blocks.0", "a=2/3/4", "=4", f"a={'9' * 5000}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="--override takes PATTERN=BITS"):
            parse_overrides([f"@{path}"])
    for text in ("", "# where from\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no line PATTERN=BITS"):
            parse_overrides([f"@{path}"])
    path.write_bytes(b"\xff\xfe=4")
    for name in (path, tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="no text file that can be read"):
            parse_overrides([f"@{name}"])
