"""Every file that is no packed model ends as PackedFileError, without a crash, a hang or memory beyond its size."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from forgery import NONSENSE, Forged, refusal, take_apart
from packed_models import LAYER, make_packed
from qvit.errors import PackedFileError
from qvit.format.packed import MAX_HEADER, read_packed, write_packed


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


def test_forgery_without_a_change_is_read(path: Path, forged: Forged, content: bytes) -> None:
    path.write_bytes(forged.bytes())
    assert read_packed(path).program.bits()["head"] == (
        3,
        3,
    )  # so what is refused below is refused for its change alone
    path.write_bytes(content)
    assert read_packed(path).program.bits()["head"] == (3, 3)


def test_file_cut_anywhere_is_refused(path: Path, content: bytes, forged: Forged) -> None:
    start = len(content) - len(forged.data)
    ends = {start + end for entry in forged.index.values() for end in entry["data_offsets"]}
    places = {0, 1, 7, 8, 9, start // 2, start - 1, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends)}
    for place in sorted(places):
        if place < len(content):
            message = refusal(path, content[:place])
            told = ("cut short", "is no JSON", "no JSON object", "is empty")
            assert any(text in message for text in told), (place, message)


def test_cut_file_names_the_entry(path: Path, content: bytes, forged: Forged) -> None:
    last = max(forged.index, key=lambda name: forged.index[name]["data_offsets"])
    assert f"{last!r} is cut short" in refusal(path, content[:-5])


@pytest.mark.parametrize("part", ["header", "data"])
def test_every_flipped_byte_is_refused(path: Path, content: bytes, forged: Forged, part: str) -> None:
    start = len(content) - len(forged.data)
    rng = np.random.default_rng(0)
    places = np.arange(start) if part == "header" else np.arange(start, len(content))
    for place in rng.choice(places, 1200, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(PackedFileError, match=r"m\.safetensors"):
            read_packed(path)


def test_bursts_of_damage_are_refused(path: Path, content: bytes) -> None:
    rng = np.random.default_rng(1)
    for _ in range(800):
        damaged = bytearray(content)
        start, length = int(rng.integers(len(content))), int(rng.integers(1, 200))
        noise = rng.integers(0, 256, len(damaged[start : start + length])).astype(np.uint8).tobytes()
        choice = rng.integers(4)
        if choice == 0:
            damaged[start : start + length] = noise
        elif choice == 1:
            del damaged[start : start + length]
        elif choice == 2:
            damaged[start:start] = noise
        else:
            damaged[start : start + length] = bytes(length)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(PackedFileError, match=r"m\.safetensors"):
            read_packed(path)


def test_number_beyond_floating_point_is_refused(path: Path, forged: Forged) -> None:
    text = json.dumps(forged.header)
    assert text.count('"eps": 1e-06') > 1
    assert "eps: it must be between 0 and 1, not inf" in refusal(path, forged.bytes(text.replace("1e-06", "1e400")))


@pytest.mark.parametrize(
    "name", ["version", "checksum", "name", "input", "program", "preprocessing", "classes", "origin"]
)
def test_nonsense_in_the_header_is_refused(path: Path, forged: Forged, name: str) -> None:
    for value in NONSENSE:
        if name == "origin" and isinstance(value, dict):
            continue  # any object is an origin
        if name == "name" and value == "all":
            continue
        changed = copy.deepcopy(forged)
        changed.header[name] = value
        text = json.dumps(changed.header) if name == "checksum" else None
        assert name in refusal(path, changed.bytes(text))
    del forged.header[name]
    assert f"{name} " in refusal(path, forged.bytes(json.dumps(forged.header)))


@pytest.mark.parametrize("field", ["input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"])
def test_nonsense_in_the_preprocessing_is_refused(path: Path, forged: Forged, field: str) -> None:
    for value in [
        None,
        True,
        0,
        -1,
        1e-300,
        1e-9,
        1e308,
        "",
        "x" * 10_000,
        [],
        [0, 0, 0],
        [1e-300] * 3,
        [None] * 3,
        [3, 10**9, 10**9],
        {},
    ]:
        if field == "mean" and value in ([0, 0, 0], [1e-300] * 3):
            continue
        changed = copy.deepcopy(forged)
        changed.header["preprocessing"][field] = value
        assert "preprocessing" in refusal(path, changed.bytes())
    del forged.header["preprocessing"][field]
    assert "preprocessing must have" in refusal(path, forged.bytes())


def entry_changes() -> Iterator[tuple[str, Callable[[dict[str, Any]], None], str]]:
    def put(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda index: index["norm.bias"].__setitem__(field, value)

    for dtype in ("F64", "F16", "BF16", "I64", "BOOL", "f32", "", None, 4, ["F32"], {}):
        yield f"dtype {dtype}", put("dtype", dtype), "'norm.bias' has dtype"
    yield "dtype U8", put("dtype", "U8"), "'norm.bias' takes the bytes"
    for shape in (None, 10, "10", [10.0], [True], [-10], [2**63], [10**400], [[10]], [1] * 5, {}):
        yield f"shape {str(shape)[:20]}", put("shape", shape), "'norm.bias' has shape"
    for shape in ([], [11], [0], [2**32, 2**31], [2**47, 2**47, 2**47, 2**47]):
        yield f"shape {shape}", put("shape", shape), "'norm.bias' takes the bytes"
    for shape in ([2, 5], [10, 1], [1, 1, 1, 10]):
        yield f"shape {shape}", put("shape", shape), "norm.bias is F32"
    for offsets in (None, 0, [0], [0, 40, 80], ["0", "40"], [0.0, 40.0], [-40, 0], [10**400, 10**400], {}):
        yield f"offsets {str(offsets)[:20]}", put("data_offsets", offsets), "'norm.bias' has data_offsets"
    for offsets in ([40, 0], [0, 0], [0, 2**40]):
        yield f"offsets {offsets}", put("data_offsets", offsets), "'norm.bias' takes the bytes"
    yield "overlap", put("data_offsets", [0, 40]), "starts at byte"
    yield "beyond", put("data_offsets", [2**40, 2**40 + 40]), "starts at byte"
    yield "no shape", lambda index: index["norm.bias"].pop("shape"), "'norm.bias' must have a dtype"
    yield "more", put("extra", 1), "'norm.bias' must have a dtype"
    for value in (None, 1, "x", [], {}):
        yield (
            f"entry {value}",
            lambda index, v=value: index.__setitem__("norm.bias", v),
            "'norm.bias' must have a dtype",
        )
    yield "gap", lambda index: index.pop("norm.bias"), "starts at byte"
    yield "renamed", lambda index: index.__setitem__("norm.bia", index.pop("norm.bias")), "norm.bias is absent"


CHANGES = list(entry_changes())


@pytest.mark.parametrize(("change", "match"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_entry_that_cannot_be_is_refused_by_name(path: Path, forged: Forged, change: Any, match: str) -> None:
    change(forged.index)
    assert match in refusal(path, forged.bytes())


def test_missing_entry_is_named(path: Path, forged: Forged) -> None:
    last = max(forged.index, key=lambda name: forged.index[name]["data_offsets"])
    start, _ = forged.index.pop(last)["data_offsets"]
    forged.data = forged.data[:start]
    assert f"{last} is absent" in refusal(path, forged.bytes())


def test_extra_entry_is_named(path: Path, forged: Forged) -> None:
    size = len(forged.data)
    forged.index["blocks.0.evil"] = {"dtype": "U8", "shape": [3], "data_offsets": [size, size + 3]}
    forged.data += b"abc"
    assert "'blocks.0.evil' is no entry of this program" in refusal(path, forged.bytes())


def test_exchanged_entries_of_one_shape_are_refused(path: Path, content: bytes) -> None:
    first, second = b'"blocks.0.norm1.weight"', b'"blocks.0.norm2.weight"'
    assert content.count(first) == content.count(second) == 1
    swapped = content.replace(first, b"<one>").replace(second, first).replace(b"<one>", second)
    assert len(swapped) == len(content)
    assert "checksum" in refusal(path, swapped)


def test_bytes_after_the_end_are_refused(path: Path, content: bytes) -> None:
    assert "goes on for 3 bytes after its last entry" in refusal(path, content + b"abc")


def test_newer_version_says_to_update(path: Path, forged: Forged) -> None:
    forged.header = {"version": 3, "layers": "in a way not thought of yet"}
    assert "version is 3, this qvit reads 2: update qvit" in refusal(path, forged.bytes())


def test_version_that_was_never_released_says_the_way_out(path: Path, forged: Forged) -> None:
    forged.header = {"version": 1, "checksum": "0" * 8, "architecture": {}, "bits": {}}
    assert "version is 1, which was never released: export the checkpoint again" in refusal(path, forged.bytes())


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("norm.weight", np.nan, "holds a NaN"),
        ("head.scale", np.inf, "holds a NaN"),
        ("blocks.0.attn.query.offset", -np.inf, "holds a NaN"),
        ("prefix_tokens", np.nan, "holds a NaN"),
        ("blocks.0.mlp.fc1.bias", np.nan, "holds a NaN"),
        ("head.input_scale", 0, "must be positive"),
        ("patch_embed.proj.input_scale", -1, "must be positive"),
        ("blocks.0.attn.map.scale", 0, "must be positive"),
        ("blocks.0.attn.key.scale", -1e-9, "must be positive"),
        ("blocks.0.attn.query_rectifier.gamma", 0, "is divided by"),
    ],
)
def test_value_that_cannot_be_computed_with_is_refused(
    path: Path, forged: Forged, name: str, value: float, match: str
) -> None:
    _, end = forged.index[name]["data_offsets"]
    forged.data = forged.data[: end - 4] + np.float32(value).tobytes() + forged.data[end:]
    message = refusal(path, forged.bytes())
    assert name in message
    assert match in message


def test_bits_after_a_row_are_refused(path: Path, forged: Forged) -> None:
    _, end = forged.index["head.codes"]["data_offsets"]  # rows of 10 codes of 3 bits: 2 bits are left
    forged.data = forged.data[: end - 1] + bytes([forged.data[end - 1] | 0x80]) + forged.data[end:]
    assert "head.codes has bits set after the last code" in refusal(path, forged.bytes())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "the header is no JSON"),
        ("{", "the header is no JSON"),
        ("[]", "the header must be an object"),
        ("null", "the header must be an object"),
        ("1" * 5000, "the header is no JSON"),
        ('{"version":NaN}', "the header holds NaN"),
        ('{"version":1e999}', "version must be 2, not inf"),
        ('{"version":1,"version":1}', "the header has 'version' twice"),
        ('{"version":' + "9" * 5000 + "}", "the header is no JSON"),
        ('{"version":1,"a":"\ud800"}', "no Unicode"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("\ufeff{}", "the header is no JSON"),
        ('{"version":2,"checksum":"0","x":1}', "name is absent from the header"),
    ],
)
def test_header_that_is_no_json_is_refused(path: Path, forged: Forged, text: str, match: str) -> None:
    assert match in refusal(path, forged.bytes(text))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "no JSON object"),
        (b"{}", "no packed model of qvit's"),
        (b"{} \n", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{" * 50_000 + b"}", "no JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b"\xff\xfe{}", "no text"),
        (b'{"__metadata__":null}', "no packed model of qvit's"),
        (b'{"__metadata__":[]}', "no packed model of qvit's"),
        (b'{"__metadata__":{"qvit":1}}', "no packed model of qvit's"),
        (b'{"__metadata__":{"qvit":"{}","more":"x"}}', "unknown entry 'more'"),
        (b'{"__metadata__":{"qvit":"{}"},"__metadata__":{}}', "has '__metadata__' twice"),
    ],
)
def test_safetensors_header_that_is_none_is_refused(path: Path, forged: Forged, raw: bytes, match: str) -> None:
    assert match in refusal(path, forged.bytes(raw=raw))


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
def test_false_length_of_the_header_is_refused(path: Path, content: bytes, length: int) -> None:
    assert refusal(path, length.to_bytes(8, "little") + content[8:])


def test_large_header_is_refused_before_it_is_read(path: Path) -> None:
    raw = b'{"__metadata__":{"qvit":"' + b"x" * (MAX_HEADER + 1) + b'"}}'
    assert "a header at most" in refusal(path, len(raw).to_bytes(8, "little") + raw)


def test_other_safetensors_file_is_refused(path: Path) -> None:
    tensors = {"head.weight": np.zeros((3, 4), np.float32), "head.bias": np.zeros(3, np.float32)}
    assert "is a file of weights" in refusal(path, safetensors.numpy.save(tensors))
    assert "is a file of weights" in refusal(path, safetensors.numpy.save(tensors, {"format": "pt"}))


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"PK\x03\x04" * 100, b"\x89PNG\r\n\x1a\n" + bytes(500), b"\x7fELF" + bytes(100), bytes(4096)],
)
def test_other_file_is_refused(path: Path, content: bytes) -> None:
    assert refusal(path, content)


def test_path_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PackedFileError, match=r"There is no file .*absent"):
        read_packed(tmp_path / "absent.safetensors")
    with pytest.raises(PackedFileError, match="is a folder and no file"):
        read_packed(tmp_path)
    with pytest.raises(PackedFileError, match="cannot be read"):
        read_packed("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PackedFileError, match="it is no file"):
            read_packed(tmp_path / "pipe")
    if Path("/dev/zero").exists():
        with pytest.raises(PackedFileError, match="it is no file"):
            read_packed("/dev/zero")
