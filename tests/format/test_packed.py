from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_models import DEIT_SMALL, LAYER, make_packed, random_packed
from qvit.config import Bits
from qvit.errors import OutputError, PackedFileError
from qvit.format.codes import pack_codes, unpack_codes
from qvit.format.ops import Layer
from qvit.format.packed import PackedModel, read_packed, write_packed


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.integers(2, 8))
    rows, count = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    code = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = draw(st.lists(st.lists(code, min_size=count, max_size=count), min_size=rows, max_size=rows))
    return bits, np.array(codes)


@settings(deadline=None)
@given(rows_of_codes())
def test_code_k_lies_at_bit_k_times_bits(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    data = pack_codes(codes, bits)
    assert data.dtype == np.uint8
    assert data.shape == (len(codes), -(-codes.shape[1] * bits // 8))
    for row, packed in zip(codes.tolist(), data, strict=True):
        stream = int.from_bytes(packed.tobytes(), "little")
        assert stream == sum((code + 2 ** (bits - 1)) << (k * bits) for k, code in enumerate(row))


@settings(deadline=None)
@given(rows_of_codes())
def test_unpacking_gives_the_codes_back(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    unpacked = unpack_codes(pack_codes(codes, bits), bits, codes.shape[1])
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize(("bits", "code"), [(2, 2), (2, -3), (4, 8), (8, 128), (8, -129)])
def test_code_that_does_not_fit_is_refused(bits: int, code: int) -> None:
    with pytest.raises(ValueError, match=f"a code of {bits} bits must be in"):
        pack_codes(np.array([[0, code]]), bits)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"distillation_token": True, "register_tokens": 2},
    "everything": {
        "embed_norm": ("rms", 1e-5),
        "pre_norm": ("layer", 1e-5),
        "pool_norm": ("layer", 1e-12),
        "qk_norm": ("rms", 1e-6),
        "attention_norm": LAYER,
        "mlp_norm": LAYER,
        "rectifier": "token",
        "mlp": "swiglu",
        "pool": "avg",
        "pool_skip": 1,
    },
    "parallel": {"block": "parallel", "parallel": 3, "mlp": "glu", "position_embedding": "none"},
}


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read(tmp_path: Path, variant: str, bits: int) -> None:
    model = make_packed(bits, **VARIANTS[variant])
    write_packed(tmp_path / "m.safetensors", model)
    read = read_packed(tmp_path / "m.safetensors")
    for field in dataclasses.fields(PackedModel):
        if field.name not in ("tensors", "checksum"):
            assert getattr(read, field.name) == getattr(model, field.name)
    assert read.checksum.encode() in (tmp_path / "m.safetensors").read_bytes()
    assert list(read.tensors) == list(model.tensors)
    for name, array in model.tensors.items():
        assert read.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(read.tensors[name], array)


def test_layers_say_their_codes_and_scales(tmp_path: Path) -> None:
    model = make_packed(5)
    qkv = model.layer(model.program.layers()["blocks.0.attn.qkv"])
    assert qkv.codes.shape == (24, 10)
    np.testing.assert_array_equal(qkv.codes, unpack_codes(model.tensors["blocks.0.attn.qkv.codes"], 5, 10))
    assert qkv.bits == Bits(5, 5)
    assert qkv.input_scale == model.tensors["blocks.0.attn.qkv.input_scale"][0]
    assert qkv.input_offset == model.tensors["blocks.0.attn.qkv.input_offset"][0]


def test_file_is_the_same_every_time_and_safetensors_reads_it(tmp_path: Path) -> None:
    model, first, second = make_packed(), tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_packed(first, model)
    write_packed(second, model)
    assert first.read_bytes() == second.read_bytes()
    with safetensors.safe_open(first, "np") as file:
        header = json.loads(file.metadata()["qvit"])
        assert header["version"] == 2
        assert header["program"][-1]["heads"][0]["bits"] == [3, 3]
        assert set(file.keys()) == set(model.tensors)
        for name in file.keys():  # noqa: SIM118
            np.testing.assert_array_equal(file.get_tensor(name), model.tensors[name])


def test_reading_holds_little_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_packed(path, make_packed(4, **DEIT_SMALL))
    size = path.stat().st_size
    assert size > 10_000_000
    tracemalloc.start()
    try:
        model = read_packed(path)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(model.program.attentions()) == 12
    assert peak < size + 2_000_000  # the largest tensor has 384 000 bytes, the header takes the rest
    assert current < size + 200_000


def test_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    write_packed(path, make_packed())
    before = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_packed(path, make_packed(5))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def change_head_bias(model: PackedModel, value: Any) -> None:
    model.tensors["head.bias"] = value


def change_head_bits(model: PackedModel, bits: Bits) -> None:
    *others, classify = model.program.operations
    heads = tuple(Layer(head.name, head.inputs, head.outputs, bits) for head in classify.heads)  # type: ignore[attr-defined]
    operations = (*others, dataclasses.replace(classify, heads=heads))  # type: ignore[type-var]
    model.program = dataclasses.replace(model.program, operations=operations)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda model: change_head_bias(model, np.zeros(5)), "head.bias is float64"),
        (lambda model: change_head_bias(model, np.zeros(4, np.float32)), r"head.bias is float32 \(4,\)"),
        (lambda model: change_head_bias(model, np.full(5, np.nan, np.float32)), "head.bias holds a NaN"),
        (lambda model: model.tensors.pop("norm.bias"), "norm.bias is absent"),
        (lambda model: model.tensors.update(other=np.zeros(1, np.float32)), "'other' is no entry"),
        (lambda model: model.classes.pop(), "classes has 4 names"),
        (lambda model: model.origin.update(path=Path("x")), "not JSON serializable"),
        (lambda model: model.origin.update(top1=float("nan")), "not JSON compliant"),
        (lambda model: change_head_bits(model, Bits(9, 8)), r"heads\[0\].bits: it must be a whole number from 2 to 8"),
        (lambda model: model.preprocessing.pop("mean"), "preprocessing must have"),
    ],
)
def test_model_that_could_not_be_read_is_not_written(tmp_path: Path, spoil: Any, match: str) -> None:
    model = make_packed()
    spoil(model)
    with pytest.raises(PackedFileError, match=match):
        write_packed(tmp_path / "m.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_scale_of_weights_may_be_negative_whatever_its_layer_is_called(tmp_path: Path) -> None:
    """A layer may be called as an operand is; a folded LayerScale makes its scales negative."""
    program = make_packed().program
    *others, classify = program.operations
    heads = tuple(Layer("blocks.0.attention.query", head.inputs, head.outputs, head.bits) for head in classify.heads)
    operations = (*others, dataclasses.replace(classify, heads=heads))
    model = random_packed(dataclasses.replace(program, operations=operations))
    model.tensors["blocks.0.attention.query.scale"][:] = -0.5
    write_packed(tmp_path / "m.safetensors", model)
    read = read_packed(tmp_path / "m.safetensors")
    assert (read.layer(read.program.layers()["blocks.0.attention.query"]).scale == -0.5).all()
    model.tensors["blocks.0.attn.query.scale"][:] = -0.5
    with pytest.raises(PackedFileError, match=r"blocks\.0\.attn\.query\.scale must be positive"):
        write_packed(tmp_path / "m.safetensors", model)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("std", [1e-300] * 3, "std must be from 0.0001 to 10000.0, as pixels from 0 to 1 have it"),
        ("std", [0.0] * 3, "std must be from 0.0001"),
        ("std", [1e300] * 3, "std must be from 0.0001"),
        ("mean", [1e300] * 3, "mean must be at most 10000.0 from 0"),
        ("input_size", [3.0, 8, 8], r"input_size must be \[3, 8, 8\]"),
        ("input_size", [3, 8, 16], r"input_size must be \[3, 8, 8\]"),
        ("crop_pct", 1e-300, "crop_pct must be a number from 0.1 to 1"),
    ],
)
def test_preprocessing_that_no_image_survives_is_refused(tmp_path: Path, field: str, value: Any, match: str) -> None:
    model = make_packed()
    model.preprocessing[field] = value
    with pytest.raises(PackedFileError, match=match):
        write_packed(tmp_path / "m.safetensors", model)


def test_reading_imports_neither_torch_nor_anything_heavy() -> None:
    code = "import sys, qvit.format.packed, qvit.runtime.reference; print(*sorted(sys.modules))"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=one_thread)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "qvit" in loaded
    assert not {"torch", "timm", "scipy", "rich", "safetensors", "PIL"} & loaded
