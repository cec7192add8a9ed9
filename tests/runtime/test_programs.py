"""Random valid programs through the file into the engine, on every instruction set, against the reference.

Float arithmetic differs in its last places, so a value beside the border between two codes may fall either way, and
then everything after it differs. So the codes are compared quantizer by quantizer in the order they run: where an
image's codes first differ, each of them must be the neighbour's whose border its value lies at; an image without such a
code must have the reference's logits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from members import CLASSES, FAMILY_MEMBERS, family_member, packed, student_of
from packed_models import random_packed
from programs import programs
from qvit import QuantConfig
from qvit.errors import ConfigError
from qvit.format.packed import PackedModel, read_packed, write_packed
from qvit.format.program import Program
from qvit.runtime import reference
from qvit.runtime.engine import instruction_sets, load

BORDER = 2e-3
"""How near to a border between codes, in codes, a value must lie to fall on the other side of it."""
CLOSE = 1e-5
"""Of the largest logit."""


class Recorded(reference.ReferenceEngine):
    """The reference, keeping every quantizer's codes, unsigned, and its values in codes before they are rounded."""

    def __init__(self, packed: PackedModel) -> None:
        self.codes: dict[str, NDArray[np.int64]] = {}
        self.values: dict[str, NDArray[np.float64]] = {}
        super().__init__(packed, self._keep)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with mock.patch.object(reference, "quantize", self._quantize):
            return super().__call__(images)

    def _quantize(self, x, scale, offset, low: int, high: int) -> NDArray[np.int64]:
        self._low, self._value = low, np.clip((x.astype(np.float64) - offset) / scale, low, high) - low
        return QUANTIZE(x, scale, offset, low, high)

    def _keep(self, name: str, codes: NDArray[np.int64]) -> None:
        self.codes[name], self.values[name] = codes - self._low, self._value


QUANTIZE = reference.quantize


def borderline(values: NDArray[np.float64], codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return whether each code is one that its value may be rounded to."""
    return np.abs(values - codes) <= 0.5 + BORDER


def check(path: Path, images: NDArray[np.float32]) -> None:
    """Compare every instruction set with the reference."""
    expected = Recorded(read_packed(path))
    outputs = expected(images)
    for isa in instruction_sets():
        engine = load(path, threads=1, instruction_set=isa)
        got, codes = engine(images), engine.codes(images)
        assert codes.keys() == expected.codes.keys()
        same = np.ones(len(images), bool)
        for name, right in expected.codes.items():
            assert codes[name].shape == right.shape, (isa, name)
            differs = (codes[name] != right).reshape(len(images), -1).any(axis=1)
            near = borderline(expected.values[name], codes[name]).reshape(len(images), -1).all(axis=1)
            assert near[same].all(), f"{isa}: {name} has codes that its values do not lie beside"
            same &= ~differs
        error = np.abs(got - outputs).max(axis=1)
        assert (error[same] <= CLOSE * max(1.0, np.abs(outputs).max())).all(), isa
        # Neither the threads nor the other images of a call matter.
        threaded = load(path, threads=3, instruction_set=isa)
        np.testing.assert_array_equal(threaded(images), got)
        np.testing.assert_array_equal(threaded(images[1:2]), got[1:2])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(program=programs(), seed=st.integers(0, 2**16))
def test_every_instruction_set_computes_what_the_file_says(program: Program, seed: int) -> None:
    images = np.random.default_rng(seed).standard_normal((3, *program.input)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_packed(path, random_packed(program, seed))
        try:
            load(path)
        except ConfigError as refusal:
            if not str(refusal).startswith("The engine cannot run random: it has tokens that come after"):
                raise
            return
        check(path, images)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("member", FAMILY_MEMBERS)
def test_every_familys_members_run(tmp_path: Path, member: str, bits: int) -> None:
    model, images = family_member(member)
    path = tmp_path / "model.safetensors"
    packed(student_of(model, images, QuantConfig(bits, bits)), path, images, classes=CLASSES[: model.num_classes])
    check(path, images.numpy())
