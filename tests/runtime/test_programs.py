"""The engine runs random programs of every operation as the reference does, on every instruction set."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from members import CLASSES, FAMILY_MEMBERS, family_member, packed, student_of
from packed_models import random_packed
from programs import programs
from qvit import QuantConfig
from qvit.format.packed import PackedModel
from qvit.format.program import Program
from qvit.runtime.engine import Engine, instruction_sets
from qvit.runtime.reference import ReferenceEngine

IMAGES = 3
RARE = 0.02
"""Share of a quantizer's codes of one image that may lie on the edge between two: float arithmetic differs in its last
place."""


def first_difference(model: PackedModel, engine: Engine, images: NDArray[np.float32]) -> str | None:
    """Return where an image's codes first differ from the reference's by more than a value on the edge, if anywhere.

    From the first such value on everything may differ; up to there nothing does.
    """
    expected: dict[str, NDArray[np.int64]] = {}
    ReferenceEngine(model, watch=expected.__setitem__)(images)
    codes = engine.codes(images)
    assert codes.keys() == expected.keys()
    edge = np.zeros(len(images), bool)
    for name, wanted in expected.items():
        assert codes[name].shape == wanted.shape, name
        bits = model.program.bits()[name].activation
        unsigned = wanted if name.endswith(".map") else wanted + 2 ** (bits - 1)
        distance = np.abs(codes[name].astype(np.int64) - unsigned).reshape(len(images), -1)
        allowed = np.maximum(1, RARE * distance.shape[1])
        wrong = ~edge & ((distance.max(axis=1) > 1) | ((distance > 0).sum(axis=1) > allowed))
        if wrong.any():
            return f"{name}: {(distance > 0).mean(axis=1)}"
        edge |= (distance > 0).any(axis=1)
    return None


@settings(max_examples=40, deadline=None)
@given(programs(), st.integers(0, 2**32 - 1))
def test_codes_are_the_references_on_every_instruction_set(program: Program, seed: int) -> None:
    model = random_packed(program, seed)
    images = np.random.default_rng(seed).standard_normal((IMAGES, *model.program.input)).astype(np.float32)
    for isa in instruction_sets():
        engine = Engine(copy.deepcopy(model), threads=1, instruction_set=isa)
        assert first_difference(model, engine, images) is None, isa


@settings(max_examples=40, deadline=None)
@given(programs(), st.integers(0, 2**32 - 1))
def test_threads_and_batches_change_nothing(program: Program, seed: int) -> None:
    model = random_packed(program, seed)
    images = np.random.default_rng(seed).standard_normal((IMAGES, *model.program.input)).astype(np.float32)
    whole = Engine(copy.deepcopy(model), threads=1)(images)
    engine = Engine(copy.deepcopy(model), threads=3)
    np.testing.assert_array_equal(engine(images), whole)
    for index in range(IMAGES):
        np.testing.assert_array_equal(engine(images[index : index + 1])[0], whole[index])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("member", FAMILY_MEMBERS)
def test_every_familys_members_run(tmp_path: Path, member: str, bits: int) -> None:
    model, images = family_member(member)
    student = student_of(model, images, QuantConfig(bits, bits))
    file = packed(student, tmp_path / "m.safetensors", images, classes=CLASSES[: model.num_classes])
    for isa in instruction_sets():
        engine = Engine(copy.deepcopy(file), threads=2, instruction_set=isa)
        assert first_difference(file, engine, images.numpy()) is None, isa
