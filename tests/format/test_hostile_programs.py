"""Files whose program an attacker changed, with a checksum that is right: refused by place, or run as they say."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from family_programs import FAMILIES
from forgery import NONSENSE, Forged, refusal, take_apart, ways_of
from packed_models import LAYER, make_packed, random_packed
from qvit.errors import PackedFileError
from qvit.format.packed import PackedModel, read_packed, write_packed
from qvit.runtime.engine import Engine, instruction_sets
from qvit.runtime.reference import ReferenceEngine


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "m.safetensors"
    write_packed(path, make_packed(3, depth=1, rectifier="token", qk_norm=LAYER))
    return path.read_bytes()


@pytest.fixture
def forged(content: bytes) -> Forged:
    return take_apart(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


PROGRAM = make_packed(3, depth=1, rectifier="token", qk_norm=LAYER).program.to_list()
WAYS = [way for way in ways_of(PROGRAM) if len(way) > 1]


def test_nonsense_is_put_into_every_operation() -> None:
    assert {way[0] for way in WAYS} == set(range(len(PROGRAM)))


@pytest.mark.parametrize("number", range(len(PROGRAM)))
def test_nonsense_in_an_operation_is_refused_or_runs(path: Path, forged: Forged, number: int) -> None:
    for way in (way for way in WAYS if way[0] == number):
        for value in NONSENSE:
            changed = copy.deepcopy(forged)
            part = changed.header["program"]
            for step in way[:-1]:
                part = part[step]
            part[way[-1]] = value
            refused_or_runs(path, changed)


@pytest.mark.parametrize("name", ["name", "input"])
def test_nonsense_for_the_whole_model_is_refused_or_runs(path: Path, forged: Forged, name: str) -> None:
    for value in NONSENSE:
        changed = copy.deepcopy(forged)
        changed.header[name] = value
        refused_or_runs(path, changed)


def refused_or_runs(path: Path, forged: Forged) -> None:
    path.write_bytes(forged.bytes())
    result = attempt(path)
    if isinstance(result, PackedFileError):
        assert len(str(result)) <= 1000
        assert str(result).isprintable()
        return
    # The change was a legitimate one: another name, another scale of the attention.
    images = np.zeros((1, *result.program.input), np.float32)
    assert np.isfinite(ReferenceEngine(result)(images)).all()
    assert np.isfinite(Engine(result)(images)).all()


def attempt(path: Path) -> PackedModel | PackedFileError:
    try:
        return read_packed(path)
    except PackedFileError as error:
        return error


@pytest.mark.parametrize("isa", instruction_sets())
def test_engine_survives_numbers_at_the_end_of_their_range(isa: str) -> None:
    for extreme in (3e38, -3e38, 1e-38):
        for kind in (".scale", ".bias", "_offset", ".offset", ".weight", "input_scale", "prefix_tokens"):
            model = make_packed()
            for name, array in model.tensors.items():
                if name.endswith(kind):
                    array[...] = extreme if extreme > 0 or "scale" not in name else 1.0
            engine = Engine(model, threads=2, instruction_set=isa)
            images = np.ones((2, *engine.program.input), np.float32)
            assert engine(images).shape == (2, engine.program.output)


SIZES: dict[str, tuple[str | int, ...]] = {
    "image": ("input", 1),
    "channels": ("input", 0),
    "patch": ("program", 0, "patch", 0),
    "width": ("program", 0, "layer", "outputs"),
    "prefix": ("program", 1, "prefix"),
    "heads": ("program", 2, "branches", 0, "heads"),
    "head_dim": ("program", 2, "branches", 0, "head_dim"),
    "qkv": ("program", 2, "branches", 0, "qkv", "outputs"),
    "hidden": ("program", 3, "branches", 0, "fc2", "inputs"),
    "tokens": ("program", 5, "tokens"),
    "classes": ("program", 6, "heads", 0, "outputs"),
}


@pytest.mark.parametrize("number", [10**9, 2**16, 50])
@pytest.mark.parametrize("size", SIZES)
def test_huge_sizes_cost_nothing(path: Path, forged: Forged, size: str, number: int) -> None:
    part: Any = forged.header
    for step in SIZES[size][:-1]:
        part = part[step]
    part[SIZES[size][-1]] = number
    if size == "classes":
        forged.header["classes"] = [""] * min(number, 2**16)
    assert "m.safetensors" in refusal(path, forged.bytes())


@pytest.mark.parametrize(
    ("name", "number"), [("depth", 10**6), ("repeat", 10**6), ("parallel", 10**9), ("count", 10**30)]
)
def test_a_file_cannot_ask_for_more_operations_than_it_holds(
    path: Path, forged: Forged, name: str, number: int
) -> None:
    residual = forged.header["program"][2]
    forged.header["program"][2] = {**residual, name: number}
    assert f"program[2]: it has an unknown field '{name}': update qvit" in refusal(path, forged.bytes())
    forged.header["program"][2] = residual
    forged.header[name] = number
    assert f"the header has an unknown entry '{name}'" in refusal(path, forged.bytes())


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "tokens"},
        {"op": "norm", "name": "n", "kind": "rms", "eps": 0.1},
        {"op": "residual", "branches": [{"op": "mlp"}]},
        {"op": "pool", "kind": "avg"},
    ],
    ids=lambda operation: operation["op"],
)
def test_as_many_operations_as_a_header_holds_take_no_memory(
    path: Path, forged: Forged, operation: dict[str, Any]
) -> None:
    count = 500_000 // len(json.dumps(operation))
    forged.header["program"][2:2] = [operation] * count
    message = refusal(path, forged.bytes())
    if operation["op"] != "tokens":
        assert "program" in message


@pytest.mark.parametrize("pair", [None, 3, [3], [3, 3, 3], [1, 3], [3, 9], [3.0, 3], [True, 3], ["3", "3"], {}, []])
def test_nonsense_in_the_bits_is_refused(path: Path, forged: Forged, pair: Any) -> None:
    forged.header["program"][3]["branches"][0]["fc1"]["bits"] = pair
    message = refusal(path, forged.bytes())
    assert "program[3].branches[0].fc1" in message
    assert re.search(r"bits is absent|bits: it must be (two numbers of bits|a whole number from 2 to 8)", message)


def test_bits_must_be_of_this_program(path: Path, forged: Forged) -> None:
    attention = forged.header["program"][2]["branches"][0]
    attention["query"] = [3, 4]
    assert "query: it must be a whole number from 2 to 8, not [3, 4]" in refusal(path, forged.bytes())
    attention["query"] = 3
    forged.header["bits"] = {"blocks.1.attn.query": [3, 3]}
    assert "the header has an unknown entry 'bits'" in refusal(path, forged.bytes())
    del forged.header["bits"]
    forged.header["program"][-1]["heads"][0]["bits"] = [4, 3]
    assert "head.codes is U8 [5, 4], the program needs uint8 [5, 5]" in refusal(path, forged.bytes())


def test_bias_table_of_the_wrong_size_is_refused(path: Path) -> None:
    write_packed(path, random_packed(FAMILIES["swin"]))
    forged = take_apart(path.read_bytes())
    name = "layers.0.blocks.0.attn.relative_position_bias"
    assert forged.index[name]["shape"] == [49, 1]
    forged.index[name]["shape"] = [7, 7]
    assert f"{name} is F32 [7, 7], the program needs float32 [49, 1]" in refusal(path, forged.bytes())
    forged.index[name]["shape"] = [49, 1]
    forged.header["program"][3]["branches"][0]["window"] = [2, 4]
    assert f"{name} is F32 [49, 1], the program needs float32 [21, 1]" in refusal(path, forged.bytes())
    forged.header["program"][3]["branches"][0]["window"] = [4, 4]
    start, end = forged.index[name]["data_offsets"]
    forged.data = forged.data[:start] + np.full(49, np.nan, np.float32).tobytes() + forged.data[end:]
    assert f"{name} holds a NaN or an infinity" in refusal(path, forged.bytes())
