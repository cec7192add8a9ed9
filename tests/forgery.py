"""A packed file taken apart and put together again, as an attacker or a fault of a disk would."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from qvit.errors import PackedFileError
from qvit.format.packed import MAX_HEADER, read_packed
from qvit.format.program import read_program

Way = tuple[str | int, ...]


@dataclasses.dataclass
class Forged:
    """A packed file taken apart: an attacker changes what he likes and computes the checksum anew."""

    header: dict[str, Any]
    index: dict[str, Any]
    data: bytes

    def checksum(self, text: str) -> int:
        """Follow the format's definition: the header without its checksum, then the tensors as the program has them."""
        crc = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        try:
            program = read_program(*(self.header[name] for name in ("name", "input", "program")))
            for name in program.entries():
                start, end = self.index[name]["data_offsets"]
                crc = zlib.crc32(self.data[start:end], crc)
        except (PackedFileError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return 0  # whatever it is, the file is refused before its checksum is looked at
        return crc

    def bytes(self, text: str | None = None, raw: bytes | None = None) -> bytes:
        """Return the file, with another text of qvit's header or another safetensors header if given."""
        if text is None:
            text = json.dumps({**self.header, "checksum": "0" * 8}, separators=(",", ":"))
            text = text.replace('"checksum":"00000000"', f'"checksum":"{self.checksum(text):08x}"', 1)
        if raw is None:
            raw = json.dumps({"__metadata__": {"qvit": text}, **self.index}).encode("utf-8", "surrogatepass")
        return len(raw).to_bytes(8, "little") + raw + self.data


def take_apart(content: bytes) -> Forged:
    """Return the parts of a packed file."""
    length = int.from_bytes(content[:8], "little")
    index = json.loads(content[8 : 8 + length])
    header = json.loads(index.pop("__metadata__")["qvit"])
    return Forged(header, index, content[8 + length :])


def ways_of(data: Any, way: Way = ()) -> list[Way]:
    """Return the way to everything in plain data: the keys and indices that lead there."""
    steps = range(len(data)) if isinstance(data, list) else list(data) if isinstance(data, dict) else ()
    return [found for step in steps for found in [(*way, step), *ways_of(data[step], (*way, step))]]


def refusal(path: Path, content: bytes) -> str:
    """Return the error of reading ``content``, which may take no more memory than the file and its parsed header."""
    path.write_bytes(content)
    header = min(int.from_bytes(content[:8], "little"), len(content), MAX_HEADER)
    tracemalloc.start()
    try:
        with pytest.raises(PackedFileError) as error:
            read_packed(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(content) + 40 * header + 200_000
    message = str(error.value)
    assert str(path) in message
    assert len(message) <= 1000
    assert message.isprintable()
    return message


NONSENSE: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    10**9,
    10**30,
    1e308,
    "",
    "all",
    "x" * 10_000,
    [],
    [1],
    [[[]]],
    {},
    {"kind": "layer"},
    {"kind": "layer", "eps": 10**400},
    [10**9, 10**9],
    [10**400, 1],
]
"""Put where something else should be."""
