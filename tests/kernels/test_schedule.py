"""The plan of phases: where threads meet, and that the tasks of a phase are all rows of an image, each once."""

from __future__ import annotations

import pytest

from family_programs import FAMILIES
from packed_models import random_packed, vit_program
from qvit import _kernels
from qvit.format.branches import Attention, Residual
from qvit.format.ops import Merge
from qvit.format.program import Program
from qvit.runtime.parts import program_parts

Schedule = list[tuple[list[str], bool, list[tuple[int, int]]]]


def schedule(program: Program, threads: int = 2, batch: int = 1) -> Schedule:
    model = _kernels.Model("portable", *program.input, threads)
    for part in program_parts(program, random_packed(program).tensors):
        model.add(part)
    return model.schedule(batch)


def test_a_block_of_a_plain_vit_has_one_barrier_and_its_end_is_the_class_token_alone() -> None:
    plan = schedule(vit_program(4, image_size=(64, 64), depth=3))
    middle = ["attend", "feed_forward", "project"]
    assert [steps for steps, _, _ in plan] == [["embed", "project"], middle, middle, middle[:2]]
    assert plan[-1][2] == [(0, 1)]


def test_a_block_of_windows_is_a_phase_and_one_window_is_the_whole_image() -> None:
    program = FAMILIES["swin"]
    plan = schedule(program)
    branches = [(branch, x) for op, x in program.walk() if isinstance(op, Residual) for branch in op.branches]
    blocks = sum(isinstance(branch, Attention) and branch.group(x) < x.tokens for branch, x in branches)
    merges = sum(isinstance(operation, Merge) for operation in program.operations)
    assert [steps for steps, windows, _ in plan if windows] == [["project", "attend", "feed_forward"]] * blocks
    assert len([steps for steps, _, _ in plan if steps[0] == "merge"]) == merges > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (3, 1), (2, 5)])
def test_tasks_are_all_rows_each_once(family: str, threads: int, batch: int) -> None:
    plan = schedule(FAMILIES[family], threads, batch)
    for number, (_, _, tasks) in enumerate(plan):
        place = 0
        for first, count in tasks:
            assert first == place
            place += count
        rows = {stream.tokens for stream in FAMILIES[family].streams if hasattr(stream, "tokens")}
        assert place in rows or number == len(plan) - 1
