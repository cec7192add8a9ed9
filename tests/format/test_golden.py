"""One small file per family, written once: every later qvit reads it and gets the logits of that day.

A file is never made anew because reading or computing changed: that is what this test is there to find. To add a
family, give it a program in :mod:`family_programs` and run ``PYTHONPATH=tests python tests/format/test_golden.py``,
which writes the files that are absent. To make one anew after a change of the format's meaning, delete it first.
"""

from __future__ import annotations

import numpy as np
import pytest

from family_programs import FAMILIES
from golden import GOLDEN, check_logits, images_of
from packed_models import random_packed
from qvit.format.packed import read_packed, write_packed
from qvit.runtime.engine import instruction_sets, load
from qvit.runtime.reference import ReferenceEngine


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_gives_the_golden_logits(family: str) -> None:
    model = read_packed(GOLDEN / f"{family}.safetensors")
    check_logits(family, ReferenceEngine(model)(images_of(model.program)))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_gives_the_golden_logits(family: str, isa: str) -> None:
    for threads in (1, 2):
        engine = load(GOLDEN / f"{family}.safetensors", threads=threads, instruction_set=isa)
        check_logits(family, engine(images_of(engine.program)))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_golden_file_differ(family: str) -> None:
    """A network that gives every image the same could not show a fault."""
    expected = np.load(GOLDEN / f"{family}.npy")
    assert np.abs(expected - expected.mean(axis=0)).max() > 0.01 * np.abs(expected).max()


def test_every_golden_file_belongs_to_a_family() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"{family}.{suffix}" for family in FAMILIES for suffix in ("safetensors", "npy")
    }


def write_absent() -> None:
    """Write the golden files that are absent."""
    for seed, (family, program) in enumerate(FAMILIES.items()):
        path = GOLDEN / f"{family}.safetensors"
        if not path.exists():
            write_packed(path, random_packed(program, seed))
            model = read_packed(path)
            np.save(GOLDEN / f"{family}.npy", ReferenceEngine(model)(images_of(model.program)))


if __name__ == "__main__":
    write_absent()
