from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from qvit.format.architecture import Architecture, Norm

from packed_models import DEIT_SMALL, TINY, make_packed
from qvit.config import Bits
from qvit.errors import OutputError, PackedFileError
from qvit.format.codes import pack_codes, unpack_codes
from qvit.format.packed import PackedModel, expected_entries, read_packed, write_packed


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.integers(2, 8))
    rows, count = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    code = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = draw(st.lists(st.lists(code, min_size=count, max_size=count), min_size=rows, max_size=rows))
    return bits, np.array(codes)


@given(rows_of_codes())
def test_code_k_lies_at_bit_k_times_bits(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    data = pack_codes(codes, bits)
    assert data.dtype == np.uint8
    assert data.shape == (len(codes), -(-codes.shape[1] * bits // 8))
    for row, packed in zip(codes.tolist(), data, strict=True):
        stream = int.from_bytes(packed.tobytes(), "little")
        assert stream == sum((code + 2 ** (bits - 1)) << (k * bits) for k, code in enumerate(row))


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
        "embed_norm": Norm("rms", 1e-5),
        "pre_norm": Norm("layer", 1e-5),
        "pool_norm": Norm("layer", 1e-12),
        "qk_norm": Norm("rms", 1e-6),
        "attention_norm": Norm("layer", 1e-6),
        "mlp_norm": Norm("layer", 1e-6),
        "rectify": "token",
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
        if field.name != "tensors":
            assert getattr(read, field.name) == getattr(model, field.name)
    assert list(read.tensors) == list(model.tensors)
    for name, array in model.tensors.items():
        assert read.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(read.tensors[name], array)


def test_layers_say_their_codes_and_scales(tmp_path: Path) -> None:
    model = make_packed(5)
    qkv = model.layer("blocks.0.attn.qkv")
    assert qkv.codes.shape == (24, 10)
    np.testing.assert_array_equal(qkv.codes, unpack_codes(model.tensors["blocks.0.attn.qkv.codes"], 5, 10))
    assert qkv.bits == Bits(5, 5)
    assert qkv.input_scale == model.tensors["blocks.0.attn.qkv.input_scale"][0]
    assert qkv.input_offset == model.tensors["blocks.0.attn.qkv.input_offset"][0]


def test_file_is_the_same_every_time_and_safetensors_reads_it(tmp_path: Path) -> None:
    model, one, two = make_packed(), tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_packed(one, model)
    write_packed(two, model)
    assert one.read_bytes() == two.read_bytes()
    with safetensors.safe_open(one, "np") as file:
        header = json.loads(file.metadata()["qvit"])
        assert header["version"] == 1
        assert header["bits"]["head"] == [3, 3]
        assert set(file.keys()) == set(model.tensors)
        for name in file.keys():  # noqa: SIM118
            np.testing.assert_array_equal(file.get_tensor(name), model.tensors[name])


def test_entries_take_the_bytes_that_their_bits_need() -> None:
    net = Architecture(**TINY)
    bits = {name: Bits(3, 8) for name in net.bit_names()}
    entries = expected_entries(net, bits)
    assert entries["blocks.1.mlp.fc2.codes"] == (np.uint8, (10, 6))  # 14 codes of 3 bits
    assert entries["prefix_tokens"] == (np.float32, (1, 10))
    assert entries["position_embedding"] == (np.float32, (4, 10))
    assert "fc_norm.weight" not in entries


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
    assert model.architecture.depth == 12
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
        (lambda model: model.bits.update(head=Bits(9, 8)), "bits.head must be two whole numbers from 2 to 8"),
        (lambda model: model.preprocessing.pop("mean"), "preprocessing must have"),
    ],
)
def test_model_that_could_not_be_read_is_not_written(tmp_path: Path, spoil: Any, match: str) -> None:
    model = make_packed()
    spoil(model)
    with pytest.raises(PackedFileError, match=match):
        write_packed(tmp_path / "m.safetensors", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_size": (3, 8)}, "holds no patch"),
        ({"image_size": (65536, 65536), "patch_size": (256, 256), "channels": 1}, "beyond the limit"),
        ({"image_size": (1024, 1024), "patch_size": (2, 2)}, "dot product of 262145 codes"),
        ({"num_heads": 1024, "head_dim": 1024}, "dot product of 1048576 codes"),
        ({"patch_size": (8, 8), "channels": 2048}, "patch_size: it makes a dot product of 131072 codes"),
        ({"parallel": 2}, "only a parallel block"),
        ({"class_token": False}, "'token' needs a class token"),
        ({"distillation_token": True, "pool": "avg"}, "distillation_token: it needs"),
        ({"pool_skip": 1}, r"pool_skip: it must be one of \[0\]"),
        ({"attention_scale": 0.0}, "attention_scale: it must be positive"),
        ({"norm": None}, "norm: it must be a norm"),
        ({"norm": Norm("batch", 0.1)}, "its kind must be layer or rms, not 'batch'"),
        ({"norm": Norm("layer", -1.0)}, "eps must be between 0 and 1"),
    ],
)
def test_architecture_that_cannot_be_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(PackedFileError, match=match):
        Architecture(**{**TINY, **change})


def test_reading_imports_neither_torch_nor_anything_heavy() -> None:
    code = "import sys, qvit.format.packed, qvit.runtime.reference; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "qvit" in loaded
    assert not {"torch", "timm", "scipy", "rich", "safetensors", "PIL"} & loaded
