"""Random valid programs through the file into the engine, on every instruction set, against the reference.

Every code of the engine must be one that the reference's value, made from the engine's codes before it, may be rounded
to (:mod:`following`), and every output the reference's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import make_vit
from family_programs import shifted_program
from following import Following, check_codes
from members import CLASSES, FAMILY_MEMBERS, MEMBERS, SIZES, family_member, images_for, packed, student_of
from packed_models import make_packed, random_packed
from programs import programs
from qvit import QuantConfig
from qvit.config import Bits
from qvit.errors import ConfigError
from qvit.format.branches import Residual
from qvit.format.ops import Embed, Layer, Norm, Pool, Tokens
from qvit.format.packed import read_packed, write_packed
from qvit.format.program import Program
from qvit.runtime.engine import Engine, instruction_sets, load


def check(path: Path, images: NDArray[np.float32]) -> None:
    """Compare every instruction set with the reference."""
    expected = read_packed(path)
    for isa in instruction_sets():
        engine = load(path, threads=1, instruction_set=isa)
        got = check_codes(expected, engine, images)
        # Neither the threads nor the other images of a call matter.
        threaded = load(path, threads=3, instruction_set=isa)
        np.testing.assert_array_equal(threaded(images), got)
        np.testing.assert_array_equal(threaded(images[1:2]), got[1:2])


def has_late_tokens(program: Program) -> bool:
    """Return whether tokens come after more than the patches and one norm: what the engine refuses."""
    return any(isinstance(operation, Tokens) for operation in program.operations[3:])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(program=programs(), seed=st.integers(0, 2**16))
def test_every_instruction_set_computes_what_the_file_says(program: Program, seed: int) -> None:
    images = np.random.default_rng(seed).standard_normal((3, *program.input)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_packed(path, random_packed(program, seed))
        if has_late_tokens(program):
            with pytest.raises(ConfigError, match="it has tokens that come after more than the patches and their norm"):
                load(path)
        else:
            check(path, images)


@pytest.mark.parametrize("norms", range(4))
@pytest.mark.parametrize("tokens", [Tokens(prefix=1), Tokens(position=True)])
def test_tokens_that_come_too_late_are_refused_and_no_others(norms: int, tokens: Tokens) -> None:
    """The norms of the patches would be of the prefix, or of the positions, too."""
    first = [Norm(f"norm.{index}", "layer", 1e-6) for index in range(norms)]
    embed = Embed((2, 2), Layer("patch_embed", 4, 6, Bits(4, 4)))
    program = Program("late", (1, 4, 6), (embed, *first, tokens, Norm("last", "rms", 1e-6), Pool("avg")))
    file = random_packed(program)
    images = np.random.default_rng(0).standard_normal((2, *program.input)).astype(np.float32)
    assert has_late_tokens(program) == (norms > 1)
    if norms > 1:
        with pytest.raises(ConfigError, match="tokens that come after more than the patches and their norm"):
            Engine(file, threads=1)
    else:
        check_codes(file, Engine(file, threads=1), images)


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_hundred_less_is_not_never(isa: str) -> None:
    """Tokens of a shifted window that are no neighbours count where their logits are larger by 100, as in timm."""
    program = shifted_program()
    file = random_packed(program)
    images = np.random.default_rng(0).standard_normal((2, *program.input)).astype(np.float32)
    check_codes(file, Engine(file, threads=1, instruction_set=isa), images)


def test_a_window_of_more_tokens_than_a_task_has_rows_has_its_memory() -> None:
    wide = dataclasses.replace(shifted_program(), input=(1, 24, 48))
    (residual,) = (operation for operation in wide.operations if isinstance(operation, Residual))
    (attention,) = residual.branches
    large = Residual((dataclasses.replace(attention, window=(24, 24), shift=(0, 0)),))
    program = dataclasses.replace(wide, operations=(wide.operations[0], large, wide.operations[-1]))
    images = np.random.default_rng(0).standard_normal((1, *program.input)).astype(np.float32)
    file = random_packed(program)
    check_codes(file, Engine(file, threads=1), images)


@pytest.mark.parametrize("count", [1, 400])
def test_any_number_of_vectors_goes_through_every_norm_behind_the_pool(count: int) -> None:
    """More of them than rows of a task, whose memory they once overran; of two norms the first was left out."""
    layer = Layer("patch_embed", 1, 12, Bits(4, 4))
    norms = (Norm("first", "layer", 1e-6), Norm("second", "rms", 1e-6))
    program = Program("pooled", (1, 20, 20), (Embed((1, 1), layer), Pool("token", tokens=count), *norms))
    images = np.random.default_rng(0).standard_normal((2, *program.input)).astype(np.float32)
    file = random_packed(program)
    check_codes(file, Engine(file, threads=1), images)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("member", FAMILY_MEMBERS)
def test_every_familys_members_run(tmp_path: Path, member: str, bits: int) -> None:
    model, images = family_member(member)
    path = tmp_path / "model.safetensors"
    packed(student_of(model, images, QuantConfig(bits, bits)), path, images, classes=CLASSES[: model.num_classes])
    check(path, images.numpy())


@pytest.mark.parametrize("member", MEMBERS)
def test_codes_of_eight_bits_differ_at_borders_alone(member: str) -> None:
    name, options = MEMBERS[member]
    images = images_for(options.get("in_chans", 3), SIZES.get(member, (16, 16)))
    with tempfile.TemporaryDirectory() as folder:
        file = packed(student_of(make_vit(name, **options), images, QuantConfig(8, 8)), Path(folder) / "m.st", images)
    check_codes(file, Engine(file, threads=1), images.numpy())


def test_one_code_that_is_not_its_values_is_found() -> None:
    file = make_packed(8)
    images = np.random.default_rng(0).standard_normal((2, *file.program.input)).astype(np.float32)
    codes = Engine(file, threads=1).codes(images)
    for name, right in codes.items():
        wrong = right.copy()
        wrong.flat[0] ^= 1
        with pytest.raises(AssertionError, match=name):
            Following(file, {**codes, name: wrong})(images)
