"""Reading a header takes work in proportion to its length: counted in comparisons of names, never in seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forgery import Forged, take_apart
from packed_models import make_packed
from qvit.errors import PackedFileError
from qvit.format import header
from qvit.format.packed import read_packed, write_packed

COUNT, FEWER = 100_000, 20_000


class Counted(str):
    """A name that counts how often it is compared or hashed, and ends a test that does so too often."""

    __slots__ = ()
    work = limit = 0

    @classmethod
    def add(cls) -> None:
        cls.work += 1
        assert cls.work <= cls.limit, f"more than {cls.limit} comparisons"

    def __eq__(self, other: object) -> bool:
        self.add()
        return str.__eq__(self, other)

    def __lt__(self, other: str) -> bool:
        self.add()
        return str.__lt__(self, other)

    def __hash__(self) -> int:
        self.add()
        return str.__hash__(self)


@pytest.fixture
def forged(tmp_path: Path) -> Forged:
    write_packed(tmp_path / "m.safetensors", make_packed())
    return take_apart((tmp_path / "m.safetensors").read_bytes())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every object of a header have counted names."""

    def loads(text: str, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any], **others: Any) -> Any:
        def hook(pairs: list[tuple[str, Any]]) -> Any:
            return object_pairs_hook([(Counted(name), value) for name, value in pairs])

        return original(text, object_pairs_hook=hook, **others)

    original = json.loads
    monkeypatch.setattr(header, "json", SimpleNamespace(loads=loads, dumps=json.dumps))
    monkeypatch.setattr(Counted, "work", 0)
    monkeypatch.setattr(Counted, "limit", 20 * COUNT)


def names(count: int) -> str:
    return ",".join(f'"n{number}":0' for number in range(count))


SAME = ",".join(['"n":0'] * COUNT)
HEADERS = {
    "all the same": (f"{{{SAME}}}", "the header has 'n' twice"),
    "one that stands twice": (f'{{{names(FEWER)},"n{FEWER - 1}":0}}', f"the header has 'n{FEWER - 1}' twice"),
    "all different": (f"{{{names(FEWER)}}}", "version must be 2, not None"),
    "deep inside": (f'{{"version":2,"origin":[{{{SAME}}}]}}', "the header has 'n' twice"),
    "many small objects": (
        '{"version":2,"origin":[' + ",".join(['{"n":0}'] * FEWER) + ',{"n":0,"n":0}]}',
        "the header has 'n' twice",
    ),
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("kind", HEADERS)
def test_names_of_the_header_are_compared_in_linear_work(forged: Forged, kind: str) -> None:
    text, match = HEADERS[kind]
    with pytest.raises(PackedFileError, match=match):
        read_packed(forged.bytes(text))
    assert Counted.work > 0


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("kind", HEADERS)
def test_names_of_the_safetensors_header_are_compared_in_linear_work(forged: Forged, kind: str) -> None:
    text, _ = HEADERS[kind]
    with pytest.raises(PackedFileError, match="the safetensors header has 'n.*' twice|no packed model of qvit's"):
        read_packed(forged.bytes(raw=text.encode()))
    assert Counted.work > 0


@pytest.mark.usefixtures("counted")
def test_entries_are_compared_in_linear_work(forged: Forged) -> None:
    """Twice as many empty tensors beside the program's own take about twice as much."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [len(forged.data)] * 2}
    work = []
    for count in (5_000, 10_000):
        Counted.work = 0
        index = {**forged.index, **{f"n{number}": entry for number in range(count)}}
        with pytest.raises(PackedFileError, match="'n0' is no entry of this program"):
            read_packed(Forged(forged.header, index, forged.data).bytes())
        work.append(Counted.work)
    assert work[1] < 2.5 * work[0]


def test_operations_are_checked_in_linear_work(forged: Forged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names become plain text while a program is read, so it is the calls of Python that are counted here."""
    work = []
    for count in (1_000, 2_000):
        program = list(forged.header["program"])
        program[2:2] = [{"op": "norm", "name": f"n{number}", "kind": "rms", "eps": 0.1} for number in range(count)]
        content = Forged({**forged.header, "program": program}, forged.index, forged.data).bytes()
        calls = 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count_call)
        try:
            with pytest.raises(PackedFileError, match=r"n0\.weight is absent"):
                read_packed(content)
        finally:
            sys.setprofile(None)
        work.append(calls)
    assert work[1] < 2.2 * work[0]
