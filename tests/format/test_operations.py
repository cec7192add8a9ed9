"""Valid programs: every operation is written, read back and run as what it is, and costs what its formula says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import family_programs
import programs
from packed_models import DEIT_SMALL, make_packed, random_packed, vit_program
from qvit.errors import ConfigError, PackedFileError
from qvit.format.branches import BRANCHES, Rotary
from qvit.format.fields import field, read_factor, read_text
from qvit.format.ops import FLOAT, Layer, Operation, Stream
from qvit.format.packed import read_packed, write_packed
from qvit.format.program import OPERATIONS, Program, read_program
from qvit.runtime import arithmetic, reference
from qvit.runtime.engine import Engine
from qvit.runtime.reference import ReferenceEngine

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
every_family = pytest.mark.parametrize("family", programs.FAMILIES)


def images_of(program: Program, count: int = 2) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, *program.input)).astype(np.float32)


@every_family
@FEW
@given(data=st.data())
def test_program_is_the_same_after_json(family: str, data: st.DataObject) -> None:
    program = data.draw(programs.programs([family]))
    plain = json.loads(json.dumps(program.to_list(), allow_nan=False))
    assert read_program(program.name, list(program.input), plain) == program


@every_family
@FEW
@given(data=st.data())
def test_what_is_written_is_read(family: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    model = random_packed(data.draw(programs.programs([family])), seed=data.draw(st.integers(0, 99)))
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    write_packed(path, model)
    read = read_packed(path)
    assert read.program == model.program
    assert (read.classes, read.preprocessing, read.origin) == (model.classes, model.preprocessing, model.origin)
    assert list(read.tensors) == list(model.tensors)
    for name, array in model.tensors.items():
        assert read.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(read.tensors[name], array)


@every_family
@FEW
@given(data=st.data())
def test_reference_gives_finite_values_of_the_promised_shape(family: str, data: st.DataObject) -> None:
    model = random_packed(data.draw(programs.programs([family])), seed=data.draw(st.integers(0, 99)))
    program, seen = model.program, dict[str, np.ndarray]()
    values = ReferenceEngine(model, seen.__setitem__)(images_of(program))
    assert values.shape == (2, program.output)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert program.output == (len(model.classes) if program.classifies else program.output)
    bits = program.bits()
    assert seen.keys() == bits.keys()
    for name, codes in seen.items():
        low, high = arithmetic.signed_range(bits[name].activation)
        if name.endswith(".map"):
            low, high = 0, high - low
        assert low <= codes.min() <= codes.max() <= high, name


@every_family
@FEW
@given(data=st.data())
def test_products_are_those_that_the_reference_computes(family: str, data: st.DataObject) -> None:
    program = data.draw(programs.programs([family]))
    count = 0

    def counted(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nonlocal count
        count += a.size * b.shape[-2]
        return integer_matmul(a, b)

    integer_matmul = arithmetic.integer_matmul
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "integer_matmul", counted)
        ReferenceEngine(random_packed(program))(images_of(program, 1))
    assert count == sum(product.macs for product in program.products())
    names = [product.name for product in program.products()]
    assert len(set(names)) == len(names)
    assert set(names) <= program.bits().keys()


def test_deit_small_has_its_multiply_adds() -> None:
    """196 patches of 16 x 16 x 3 and a class token, 12 blocks of width d = 384 and hidden width 4 d:
    196 * 768 * d + 12 * (197 * d * 3 d + 2 * 197^2 * d + 197 * d * d + 2 * 197 * d * 4 d) + d * 1000.
    """
    n, d = 197, 384
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    expected = 196 * 768 * d + 12 * block + d * 1000
    assert expected == 4_598_882_304
    assert sum(product.macs for product in vit_program(4, **DEIT_SMALL).products()) == expected


def test_swin_tiny_has_its_multiply_adds() -> None:
    """Stages of n = 56^2, 28^2, 14^2, 7^2 tokens and width d = 96, 192, 384, 768 with 2, 2, 6, 2 blocks; each block has
    n * d * 3 d + 2 * n * 49 * d + n * d * d + 2 * n * d * 4 d (windows of 49 tokens), each merge n / 4 * 4 d * 2 d.
    """
    program = family_programs.swin_program(
        image=224, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, classes=1000
    )
    expected = 56**2 * 48 * 96 + 768 * 1000
    for stage, depth in enumerate((2, 2, 6, 2)):
        n, d = (56 >> stage) ** 2, 96 << stage
        expected += depth * (12 * n * d * d + 2 * n * 49 * d)
        expected += n // 4 * 4 * d * 2 * d if stage < 3 else 0
    assert expected == 4_490_566_656
    assert sum(product.macs for product in program.products()) == expected
    assert program.streams[-2] == Stream("vectors", 1, 768)
    # The weights of timm's swin_tiny_patch4_window7_224, position biases, norms and layers' biases left out.
    weights = sum(layer.inputs * layer.outputs for layer in program.layers().values())
    assert weights == 48 * 96 + 768_000 + sum(
        depth * 12 * (96 << stage) ** 2 + (8 * (96 << stage) ** 2 if stage < 3 else 0)
        for stage, depth in enumerate((2, 2, 6, 2))
    )


def test_entries_take_the_bytes_that_their_bits_need() -> None:
    entries = make_packed(3).program.entries()
    assert entries["blocks.1.mlp.fc2.codes"] == (np.uint8, (10, 6))  # 14 codes of 3 bits
    assert entries["prefix_tokens"] == (np.float32, (1, 10))
    assert entries["position_embedding"] == (np.float32, (4, 10))
    assert "fc_norm.weight" not in entries


def test_families_say_everything_that_the_format_knows() -> None:
    """So that what is tested per family, the golden files among them, leaves no operation and no field out."""
    found: set[tuple[str, str]] = set()

    def visit(record: Any) -> None:
        for entry in dataclasses.fields(record):
            value = getattr(record, entry.name)
            if value != entry.default:
                found.add((type(record).__name__, entry.name))
            for part in value if isinstance(value, tuple) and not hasattr(value, "_fields") else (value,):
                if dataclasses.is_dataclass(part):
                    visit(part)

    for program in family_programs.FAMILIES.values():
        for operation in program.operations:
            visit(operation)
    kinds = {*OPERATIONS.values(), *BRANCHES.values(), Layer, Rotary}
    assert found == {(kind.__name__, entry.name) for kind in kinds for entry in dataclasses.fields(kind)}


def test_tables_of_a_rotation_may_be_shared() -> None:
    entries = family_programs.eva_program().entries()
    assert entries["rope.cos"] == (np.float32, (1, 9, 3))
    assert entries["blocks.2.rope.sin"] == (np.float32, (2, 9, 3))
    assert sum(name.endswith(".cos") for name in entries) == 2


@dataclasses.dataclass(frozen=True)
class Scale(Operation):
    """A toy operation as somebody else might write it: a factor for everything and one per channel."""

    op: ClassVar[str] = "scale"
    name: str = field(read_text)
    factor: float = field(read_factor)

    def after(self, x: Stream, place: str) -> Stream:
        return x

    def entries(self, x: Stream):
        yield f"{self.name}.factors", FLOAT, (x.width,)


def run_scale(engine: ReferenceEngine, op: Scale, x: Stream, values: np.ndarray) -> np.ndarray:
    return values * engine.tensors[f"{op.name}.factors"] * np.float32(op.factor)


@pytest.fixture
def with_toy() -> Program:
    plain = vit_program(4)
    place = [type(operation).__name__ for operation in plain.operations].index("Pool")
    operations = (*plain.operations[:place], Scale("toy", 2.5), *plain.operations[place:])
    return Program("with a toy", plain.input, operations)


def test_operation_from_outside_is_one_class_and_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_toy: Program
) -> None:
    model, path = random_packed(with_toy), tmp_path / "m.safetensors"
    with pytest.raises(PackedFileError, match="needs operation 'scale', and this qvit knows embed, .*: update qvit"):
        write_packed(path, model)
    monkeypatch.setitem(OPERATIONS, "scale", Scale)
    monkeypatch.setitem(reference.RUN, Scale, run_scale)
    write_packed(path, model)
    read = read_packed(path)
    assert read.program == with_toy
    images = images_of(with_toy)
    got = ReferenceEngine(read)(images)
    # The final norm's weight and bias may take the factors instead.
    plain = random_packed(vit_program(4))
    factors = model.tensors.pop("toy.factors") * np.float32(2.5)
    plain.tensors = {
        **model.tensors,
        **{f"norm.{part}": model.tensors[f"norm.{part}"] * factors for part in ("weight", "bias")},
    }
    np.testing.assert_allclose(got, ReferenceEngine(plain)(images), rtol=1e-5, atol=1e-5)


def test_engine_refuses_an_operation_from_outside_by_name(monkeypatch: pytest.MonkeyPatch, with_toy: Program) -> None:
    monkeypatch.setitem(OPERATIONS, "scale", Scale)
    with pytest.raises(ConfigError, match="'scale'"):
        Engine(random_packed(with_toy))
