"""Programs that cannot be meant are refused by place and reason; what is newer, by its name with the way out."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import programs
from family_programs import FAMILIES
from forgery import Way, ways_of
from packed_models import vit_program
from qvit.errors import PackedFileError
from qvit.format.program import OPERATIONS, Program, read_program


def put(data: Any, way: Way, value: Any) -> Any:
    """Return plain data with ``value`` at the end of ``way``; ``None`` takes a field or an item away."""
    data = copy.deepcopy(data)
    part = data
    for step in way[:-1]:
        part = part[step]
    if value is not None:
        part[way[-1]] = value
    else:
        del part[way[-1]]
    return data


def place_of(way: Way) -> str:
    """Return what a message calls a place in the program."""
    return "program" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in way)


def find(data: list[Any], op: str, number: int = 0) -> int:
    return [index for index, operation in enumerate(data) if operation["op"] == op][number]


def refusal(program: Program, plain: Any, size: Any = None) -> str:
    with pytest.raises(PackedFileError) as error:
        read_program(program.name, list(program.input) if size is None else size, plain)
    message = str(error.value)
    assert len(message) <= 1000
    assert "\n" not in message
    return message


def attempt(program: Program, plain: Any) -> Program | str:
    """Return what is read of plain data, or the message that refuses it."""
    try:
        return read_program(program.name, list(program.input), plain)
    except PackedFileError as error:
        message = str(error)
        assert message.startswith("program")
        assert len(message) <= 1000
        assert message.isprintable()
        return message


ATTENTION = ("branches", 0)
CASES: list[tuple[str, tuple[str, int], Way, Any, str]] = [
    # family, which operation, where in it, value, reason
    ("vit", ("norm", 0), ("op",), "convolve", "it needs operation 'convolve', and this qvit knows embed,"),
    ("vit", ("residual", 0), (*ATTENTION, "op"), "mamba", "it needs operation 'mamba', and this qvit knows att"),
    ("vit", ("residual", 0), (*ATTENTION, "op"), "norm", "it needs operation 'norm', and this qvit knows atten"),
    ("vit", ("norm", 0), ("op",), "attention", "it needs operation 'attention', and this qvit knows embed,"),
    ("vit", ("norm", 0), ("gain",), 1, "it has an unknown field 'gain': update qvit"),
    ("vit", ("embed", 0), ("layer", "groups"), 2, "it has an unknown field 'groups': update qvit"),
    ("eva", ("residual", 0), (*ATTENTION, "rotary", "mixed"), True, "it has an unknown field 'mixed': update qvit"),
    ("vit", ("norm", 0), ("kind",), "batch", "it must be one of layer, rms, not 'batch': update qvit"),
    ("vit", ("pool", 0), ("kind",), "map", "one of token, avg, max, avgmax, not 'map': update qvit"),
    ("vit", ("residual", 1), (*ATTENTION, "activation"), "mish", "it must be one of gelu, .*, not 'mish': update qvit"),
    ("vit", ("residual", 1), (*ATTENTION, "kind"), "moe", "one of plain, glu, glu_gate_last, swiglu, not 'moe': up"),
    ("vit", ("residual", 0), (*ATTENTION, "rectifier"), "row", "one of token, affine, not 'row': update qvit"),
    ("swin", ("residual", 0), (*ATTENTION, "bias"), "alibi", "one of relative_position, not 'alibi': update qvit"),
    ("eva", ("residual", 0), (*ATTENTION, "rotary", "layout"), "thirds", "one of pairs, halves, not 'thirds': update"),
    ("vit", ("embed", 0), ("layer",), None, "its layer is absent"),
    ("vit", ("residual", 0), (*ATTENTION, "qkv", "bits"), None, "its bits is absent"),
    ("vit", ("residual", 0), (*ATTENTION, "map"), 9, "it must be a whole number from 2 to 8, not 9"),
    # Widths that do not chain.
    ("vit", ("embed", 0), ("layer", "inputs"), 47, "it is 47, what flows in has 48"),
    ("vit", ("embed", 0), ("layer", "outputs"), 11, "it is 10, what flows in has 11"),
    ("vit", ("embed", 0), ("patch",), [4, 3], "it is 48, what flows in has 36"),
    ("vit", ("residual", 0), (*ATTENTION, "qkv", "outputs"), 23, "it is 23, it must be 24"),
    ("vit", ("residual", 0), (*ATTENTION, "heads"), 3, "it is 24, it must be 36"),
    ("vit", ("residual", 0), (*ATTENTION, "proj", "inputs"), 9, "it is 9, what flows in has 8"),
    ("vit", ("residual", 0), (*ATTENTION, "proj", "outputs"), 11, "it is 11, it must be 10"),
    ("vit", ("residual", 1), (*ATTENTION, "fc1", "outputs"), 28, "it is 28, it must be 14"),
    ("vit", ("residual", 1), (*ATTENTION, "fc2", "inputs"), 28, "it is 14, it must be 28"),
    ("eva", ("residual", 1), (*ATTENTION, "gate", "outputs"), 11, "it is 11, it must be 10"),
    ("eva", ("residual", 1), (*ATTENTION, "gate"), None, "kind 'swiglu', and no other, has one"),
    ("eva", ("residual", 1), (*ATTENTION, "kind"), "plain", "kind 'swiglu', and no other, has one"),
    ("features", ("residual", 1), (*ATTENTION, "kind"), "plain", "it is 28, it must be 14"),
    ("swin", ("merge", 0), ("layer", "inputs"), 12, "it is 12, what flows in has 24"),
    ("swin", ("merge", 0), ("layer", "outputs"), 13, "it is 12, what flows in has 13"),
    ("siglip", ("attention_pool", 0), ("kv", "outputs"), 24, "it is 24, it must be 16"),
    ("siglip", ("attention_pool", 0), ("proj", "outputs"), 9, "it is 8, what flows in has 9"),
    ("vit", ("classify", 0), ("heads", 0, "inputs"), 9, "it is 9, what flows in has 10"),
    ("vit", ("classify", 0), ("heads", 1, "outputs"), 6, "it is 6, it must be 5"),
    ("vit", ("classify", 0), ("heads", 1), None, "1 classifiers for 2 vectors"),
    # Windows, shifts and positions.
    ("swin", ("residual", 0), (*ATTENTION, "window"), [3, 4], r"\(3, 4\) does not divide the grid of \(8, 8\) patches"),
    ("swin", ("residual", 0), (*ATTENTION, "window"), [16, 8], r"\(16, 8\) does not divide the grid"),
    ("swin", ("residual", 0), (*ATTENTION, "window"), [0, 4], "it must be a whole number from 1 to 65536, not 0"),
    ("swin", ("residual", 0), (*ATTENTION, "window"), 4, "it must be two numbers, not 4"),
    ("swin", ("residual", 2), (*ATTENTION, "shift"), [4, 0], r"\(4, 0\) goes beyond the window of \(4, 4\)"),
    ("swin", ("residual", 2), (*ATTENTION, "shift"), [0, 65536], r"\(0, 65536\) goes beyond the window of \(4, 4\)"),
    ("swin", ("residual", 2), (*ATTENTION, "shift"), [-1, 0], "it must be a whole number from 0 to 65536, not -1"),
    ("swin", ("residual", 2), (*ATTENTION, "window"), None, "without a window there is nothing to shift"),
    ("swin", ("tokens", 0), ("prefix",), 1, "windows need patches, and no prefix tokens"),
    ("eva", ("residual", 0), (*ATTENTION, "window"), [3, 3], "windows need patches, and no prefix tokens"),
    ("eva", ("residual", 0), (*ATTENTION, "rotary", "heads"), 3, "it must be 1 or 2"),
    ("vit", ("tokens", 0), ("prefix",), 65533, "more than 65536 tokens"),
    ("vit", ("pool", 0), ("tokens",), 7, "there are 6 tokens"),
    ("vit", ("pool", 0), ("skip",), 1, "a token's pooling skips none"),
    ("swin", ("pool", 0), ("skip",), 16, "there are 16 tokens"),
    ("swin", ("pool", 0), ("tokens",), 2, "only kind 'token' gives several"),
    # Numbers.
    ("vit", ("norm", 0), ("eps",), 1, "it must be between 0 and 1, not 1"),
    ("vit", ("norm", 0), ("eps",), -1e-6, "it must be between 0 and 1, not -1e-06"),
    ("vit", ("norm", 0), ("eps",), 1e-300, "it must be between 0 and 1, not 1e-300"),
    ("vit", ("residual", 0), (*ATTENTION, "scale"), 0, "it must be a positive number, not 0"),
    ("vit", ("residual", 0), (*ATTENTION, "scale"), 1e308, "it must be a positive number, not 1e"),
    ("vit", ("residual", 0), (*ATTENTION, "heads"), 1024 * 64, "262144 channels, the limit is 65536"),
    ("siglip", ("attention_pool", 0), ("heads",), 1 << 14, "kv would have more than 65536 outputs"),
    ("features", ("residual", 1), (*ATTENTION, "fc2", "inputs"), 40_000, "fc1 would have more than 65536 outputs"),
    ("vit", ("embed", 0), ("patch",), [9, 1], "an image of 8 x 8 holds no patch of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "op", "way", "value", "match"),
    CASES,
    ids=[f"{family}-{op[0]}-{'-'.join(map(str, way))}-{value}"[:60] for family, op, way, value, _ in CASES],
)
def test_operation_that_does_not_fit_is_refused(
    family: str, op: tuple[str, int], way: Way, value: Any, match: str
) -> None:
    program = FAMILIES[family]
    plain = program.to_list()
    index = find(plain, *op)
    message = refusal(program, put(plain, (index, *way), value))
    assert message.startswith("program[")
    assert re.search(match, message), message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_must_come_where_it_can(family: str) -> None:
    """Every operation is put in every place: what is accepted is read as what it says, and the rest is refused."""
    program = FAMILIES[family]
    plain = program.to_list()
    firsts = [plain[find(plain, op)] for op in {operation["op"] for operation in plain}]
    for index in range(len(plain) + 1):
        for operation in firsts:
            changed = [*plain[:index], operation, *plain[index:]]
            read = attempt(program, changed)
            if isinstance(read, Program):  # everything that has a name stands twice now
                assert operation == {"op": "tokens"}
                assert read.to_list() == changed


def test_program_that_does_not_end_is_refused() -> None:
    program = vit_program(3)
    plain = program.to_list()
    pool = find(plain, "pool")
    assert refusal(program, plain[:pool]) == "program: it must end with a pool or with classifiers."
    assert refusal(program, []) == "program: it must be a list of operations, not []."
    assert "'pool' takes tokens, and here flow image" in refusal(program, plain[pool:])
    assert "'classify' takes vectors, and here flow tokens" in refusal(program, plain[:pool] + plain[pool + 1 :])
    assert "'pool' takes tokens, and here flow vectors" in refusal(program, [*plain[: pool + 1], *plain[pool:]])
    assert "'embed' takes image, and here flow tokens" in refusal(program, [plain[0], *plain])


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ([3, 8], "input: it must be channels, height and width, not"),
        ([3, 8, 0], "input: it must be channels, height and width, not"),
        ([3, 8.0, 8], "input: it must be channels, height and width, not"),
        ([True, 8, 8], "input: it must be channels, height and width, not"),
        ([1, 65536, 65536], "beyond the limit"),
        ([3, 3, 8], "an image of 3 x 8 holds no patch"),
        ([1, 8, 8], "it is 48, what flows in has 16"),
    ],
)
def test_image_that_cannot_be_is_refused(size: Any, match: str) -> None:
    program = vit_program(3)
    assert re.search(match, refusal(program, program.to_list(), size))


def test_more_tokens_than_a_sum_can_hold_are_refused() -> None:
    program = vit_program(3)
    plain = put(put(program.to_list(), (0, "patch"), [2, 2]), (0, "layer", "inputs"), 12)
    assert "it makes 262144 tokens, the limit is 65536" in refusal(program, plain, [3, 1024, 1024])


def test_names_that_stand_twice_are_refused() -> None:
    program = FAMILIES["vit"]
    plain = program.to_list()
    for op, way in (("norm", ("name",)), ("residual", ("branches", 0, "proj", "name"))):
        changed = put(plain, (find(plain, op), *way), "blocks.1.attn.qkv" if op == "residual" else "blocks.0.norm1")
        assert "two of its parts are called" in refusal(program, changed)
    swapped = put(plain, (find(plain, "residual", 2), *ATTENTION, "name"), "blocks.0.attn")
    assert "two of its parts are called 'blocks.0.attn." in refusal(program, swapped)


def test_tables_of_one_name_must_be_one_table() -> None:
    program = FAMILIES["eva"]
    plain = program.to_list()
    other = find(plain, "residual", 4)
    assert "two tables are called 'rope'" in refusal(program, put(plain, (other, *ATTENTION, "rotary", "name"), "rope"))


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "\x1b[31mred", "a\0b", "\u202e", 5, [], {}])
def test_name_that_no_terminal_can_print_is_refused(name: Any) -> None:
    """Names stand in messages: no line of theirs may reach a terminal raw, nor fill its screen."""
    program = FAMILIES["eva"]
    plain = program.to_list()
    ways: list[Way] = [(1, "name")] if plain[1]["op"] == "norm" else []
    residual = find(plain, "residual")
    ways += [(0, "layer", "name"), (residual, *ATTENTION, "name"), (residual, *ATTENTION, "rotary", "name")]
    ways += [(residual, *ATTENTION, "norm", "name")]
    for way in ways:
        message = refusal(program, put(plain, way, name))
        assert message.startswith(f"{place_of(way)}: it must be a name")
        assert message.isprintable()
    with pytest.raises(PackedFileError, match="^name: it must be a name"):
        read_program(name, list(program.input), plain)


NONSENSE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*OPERATIONS, "attention", "mlp"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("op"), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_nonsense_anywhere_is_refused_or_read_as_what_it_says(data: st.DataObject) -> None:
    program = data.draw(programs.programs())
    plain = program.to_list()
    way = data.draw(st.sampled_from(ways_of(plain)))
    changed = put(plain, way, data.draw(NONSENSE))
    read = attempt(program, changed)
    if isinstance(read, Program):
        assert attempt(read, read.to_list()) == read
