from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.layers
import torch
from timm.layers import Attention
from torch import nn

import jobs
import qvit
from commands import run
from members import MEMBERS, SIZES
from qvit.bench.compare import Comparison, Timing, _load, compare, interleaved
from qvit.bench.peers import PEERS, Case, Peer
from qvit.errors import ConfigError
from qvit.format.packed import read_packed
from qvit.models.families import lower
from qvit.models.from_program import float_model
from qvit.runtime.engine import instruction_sets


def packed(model: nn.Module, path: Path) -> Path:
    student = qvit.quantize(model, qvit.QuantConfig(3))
    height, width = model.patch_embed.img_size
    qvit.calibrate(student, [torch.randn(8, 3, height, width)])
    settings = {**timm.data.resolve_model_data_config(model), "input_size": [3, height, width]}
    qvit.export(student, path, preprocessing=settings, classes=list("abcdefghij"))
    return path


@pytest.fixture(scope="module")
def case(packed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a case whose ONNX file the peers share."""
    return Case(read_packed(packed_file).program, 2, 1, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.mark.parametrize("member", MEMBERS)
def test_float_model_of_a_program_has_that_program(make_model: Callable[..., nn.Module], member: str) -> None:
    name, changes = MEMBERS[member]
    size = SIZES.get(member, (16, 16))
    program, _ = lower(qvit.quantize(make_model(name, **changes)), size)
    built = float_model(program)
    again, _ = lower(qvit.quantize(built), size)
    assert again.computation() == program.computation()
    assert built(torch.randn(2, *program.input)).shape == (2, program.output)


@pytest.mark.parametrize("name", [name for name in PEERS if not name.startswith("torch-compile")])
def test_peers_run_the_float_model(case: Case, name: str) -> None:
    for package in PEERS[name].packages:
        pytest.importorskip(package)
    with torch.inference_mode():
        expected = float_model(case.program)(torch.from_numpy(case.images())).numpy()
    logits = PEERS[name].load(case)(case.images())
    assert logits.shape == expected.shape
    if "int8" in PEERS[name].title:
        assert not np.array_equal(logits, expected)
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.8
    else:
        # OpenVINO takes bfloat16 by itself where the processor has it.
        tolerance = {"torch-bf16": 2e-2, "openvino-default": 5e-3}.get(name, 1e-5)
        np.testing.assert_allclose(logits, expected, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].held and name != "torch-compile"])
def test_held_peers_use_no_more_than_they_are_held_to(
    make_model: Callable[..., nn.Module], name: str, tmp_path: Path
) -> None:
    """What oneDNN says of itself, which computes in all of them: a name that it does not know would change nothing."""
    for package in PEERS[name].packages:
        pytest.importorskip(package)
    if "avx2" not in instruction_sets():
        pytest.skip("this processor has no AVX2")
    # Held to AVX2, OpenVINO 2026.4 crashes in heads of 12 channels; these have 32.
    program, _ = lower(qvit.quantize(make_model(embed_dim=64, depth=1)), (16, 16))
    case = Case(program, 1, 1, tmp_path / "model.onnx", "avx2")
    process = jobs.start(_load_and_note, name, case, tmp_path / "said")
    process.join()
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert set(re.findall(r"^onednn_verbose,.*,isa:(.*)$", said, re.MULTILINE)) == {"Intel AVX2"}
    assert re.search(r",exec,.*avx2", said)
    assert "avx512" not in said


def _load_and_note(name: str, case: Case, said: Path) -> None:
    os.environ["ONEDNN_VERBOSE"] = "1"
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 1)
    _load(name, case)


def test_nobody_always_follows_the_same_neighbour() -> None:
    turns: list[str] = []
    seconds = interleaved({name: lambda name=name: turns.append(name) or 1.0 for name in "abc"}, 15)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 15)
    assert all(sorted(turns[at : at + 3]) == ["a", "b", "c"] for at in range(0, 45, 3))
    neighbours = {pair for at in range(0, 45, 3) for pair in itertools.pairwise(turns[at : at + 3])}
    assert len(neighbours) == 6


def test_compare_times_each_runtime_once_a_round(packed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvit.bench.compare._CONTEXT", multiprocessing.get_context("spawn"))  # as users' are
    told: list[str] = []
    result = compare({"ours": packed_file}, [1, 3], [1], peers=["torch"], rounds=3, report=told.append)
    titles = ["ours", "PyTorch eager, float32"]
    assert [(t.runtime, t.batch, t.threads) for t in result.timings] == [(t, b, 1) for b in (1, 3) for t in titles]
    assert all(len(t.seconds) == 3 and min(t.seconds) > 0 for t in result.timings)
    assert set(result.versions) == set(titles)
    assert result.versions["PyTorch eager, float32"].startswith("torch ")
    assert not result.skipped
    assert any("Timing batch 3" in line for line in told)


def test_runtime_that_is_not_installed_is_skipped(packed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "openvino", Peer("Absent", ("no-such-package",), PEERS["torch"].load))
    told: list[str] = []
    result = compare({"ours": packed_file}, [1], [1], peers=["openvino"], rounds=1, report=told.append)
    assert [timing.runtime for timing in result.timings] == ["ours"]
    assert told[0] == "Absent is skipped: no-such-package is not installed."
    assert "pip install" in result.skipped["Absent"]
    assert any(line.startswith("Absent was not measured: no-such-package") for line in result.notes())


def test_runtime_that_cannot_be_held_to_an_instruction_set_is_skipped(packed_file: Path) -> None:
    peers = ["torch", "torch-bf16"]
    result = compare({"ours": packed_file}, [1], [1], peers=peers, rounds=1, instruction_set="portable")
    assert [timing.runtime for timing in result.timings] == ["ours"]
    assert result.versions == {"ours": f"qvit {qvit.__version__}, portable"}
    assert result.skipped == {PEERS[name].title: "it cannot be held to portable." for name in peers}


def test_runtime_that_fails_is_skipped(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make_model(depth=1)
    model.blocks[0].attn = Attention(24, num_heads=2, attn_head_dim=8, qkv_bias=True)  # timm's models have no such
    path = packed(model, tmp_path / "narrow.safetensors")
    result = compare({"ours": path}, [1], [1], peers=["torch"], rounds=1)
    assert [timing.runtime for timing in result.timings] == ["ours"]
    assert "has no 2 heads of 8 channels" in result.skipped["PyTorch eager, float32"]


def test_unlike_models_are_refused(make_model: Callable[..., nn.Module], packed_file: Path, tmp_path: Path) -> None:
    for name, changes in (("depth", {"depth": 1}), ("size", {"img_size": 32})):
        other = packed(make_model(**changes), tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match="second is of another architecture than first"):
            compare({"first": packed_file, "second": other}, [1], [1], peers=[])


@pytest.mark.parametrize(("batches", "peers", "message"), [([0], [], "from 1 up"), ([1], ["tensorrt"], "no peer")])
def test_values_that_cannot_be_meant_are_refused(
    packed_file: Path, batches: list[int], peers: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare({"ours": packed_file}, batches, [1], peers=peers)


def test_ratios_compare_the_same_work() -> None:
    timings = [
        Timing("four", 1, 2, [0.5, 2.0, 1.0]),
        Timing("two", 1, 2, [0.8]),
        Timing("slow", 1, 2, [3.0, 3.0, 9.0]),
        Timing("quick", 1, 2, [2.0]),
        Timing("four", 8, 2, [4.0]),
        Timing("slow", 8, 2, [8.0]),
    ]
    comparison = Comparison(["four", "two"], timings, {}, {}, {"cpu": "some"})
    assert [comparison.ratio(timing) for timing in timings] == [1.0, 0.8, 3.0, 2.0, 1.0, 2.0]
    assert comparison.fastest_peer(1, 2) == timings[3]
    assert comparison.fastest_peer(2, 2) is None
    rows = comparison.to_dict()["timings"]
    assert rows[2]["quartiles"] == [3.0, 9.0]
    assert rows[5]["images_per_second"] == 1.0
    assert comparison.panels()["batch 8, threads 2"] == {"four": 4000.0, "slow": 8000.0}


def test_command_prints_and_writes(packed_file: Path, tmp_path: Path) -> None:
    figure, data = tmp_path / "speed.png", tmp_path / "speed.json"
    command = ["bench", packed_file, "--batch", "1", "--threads", "1", "--peers", "none", "--rounds", "2"]
    result = run(*command, "--figure", figure, "--json", data)
    assert result.status == 0, result.err
    assert "images/s" in result.out
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = json.loads(data.read_text())
    (row,) = written["timings"]
    assert row["runtime"] == "qvit, tiny.safetensors"
    assert len(row["seconds"]) == 2
    assert written["machine"]["cpu"]
