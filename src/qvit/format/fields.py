"""Fields of an operation as they stand in a file: plain data that is checked while it is read. No PyTorch here.

A record is a frozen dataclass whose fields are made by the functions below; each knows how to check a value. A field
that has its default is not written, so that a header is short.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qvit.config import MAX_BITS, MIN_BITS, Bits
from qvit.errors import PackedFileError
from qvit.files import shown

MAX_SIZE = 2**16
"""Largest number of any kind. As the length of a dot product of 8-bit codes it keeps the sum within int32:
2^16 * 255 * 128 < 2^31."""
MAX_TEXT = 200
"""Letters of the longest name: names stand in messages, which fit on a screen."""
SMALLEST_EPS = 2.0**-126
"""The smallest float32 that all engines tell from 0."""

Reader = Callable[[str, Any], Any]
"""Takes the place of a value in the file, for messages, and the value; returns what it means."""
Record = TypeVar("Record")


def need(condition: bool, place: str, reason: str) -> None:
    """Refuse what stands at ``place`` unless ``condition`` holds.

    Raises:
        PackedFileError: naming the place and the reason.
    """
    if not condition:
        raise PackedFileError(f"{place}: {reason}.")


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number of ordinary size, and no truth value."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**26
    return isinstance(value, float) and math.isfinite(value)


def is_whole(value: Any, least: int, most: int) -> bool:
    """Return whether ``value`` is a whole number from ``least`` to ``most``, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def read_text(place: str, value: Any) -> str:
    """Read a name: 1 to :data:`MAX_TEXT` letters, all of which a terminal can print."""
    named = isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()
    need(named, place, f"it must be a name of 1 to {MAX_TEXT} printable letters, not {shown(value)}")
    return str(value)


def read_flag(place: str, value: Any) -> bool:
    """Read true or false."""
    need(isinstance(value, bool), place, f"it must be true or false, not {shown(value)}")
    return bool(value)


def read_size(place: str, value: Any, least: int = 1) -> int:
    """Read a whole number from ``least`` to :data:`MAX_SIZE`."""
    reason = f"it must be a whole number from {least} to {MAX_SIZE}, not {shown(value)}"
    need(is_whole(value, least, MAX_SIZE), place, reason)
    return int(value)


def read_count(place: str, value: Any) -> int:
    """Read a whole number that may be 0."""
    return read_size(place, value, 0)


def read_bits(place: str, value: Any) -> int:
    """Read a number of bits that qvit works with."""
    need(is_whole(value, MIN_BITS, MAX_BITS), place, f"it must be a whole number from 2 to 8, not {shown(value)}")
    return int(value)


def read_layer_bits(place: str, value: Any) -> Bits:
    """Read the bits of weights and inputs, ``[4, 4]``."""
    need(isinstance(value, list) and len(value) == 2, place, f"it must be two numbers of bits, not {shown(value)}")
    return Bits(*(read_bits(place, bits) for bits in value))


def read_factor(place: str, value: Any) -> float:
    """Read a positive number."""
    need(is_number(value) and 0 < value <= MAX_SIZE, place, f"it must be a positive number, not {shown(value)}")
    return float(value)


def read_eps(place: str, value: Any) -> float:
    """Read what stands under a norm's root beside the variance."""
    need(is_number(value) and SMALLEST_EPS <= value < 1, place, f"it must be between 0 and 1, not {shown(value)}")
    return float(value)


def pair_of(read: Reader) -> Reader:
    """Return a reader of two values, (height, width)."""

    def read_pair(place: str, value: Any) -> tuple[Any, Any]:
        need(isinstance(value, list) and len(value) == 2, place, f"it must be two numbers, not {shown(value)}")
        return read(place, value[0]), read(place, value[1])

    return read_pair


def one_of(choices: tuple[str, ...]) -> Reader:
    """Return a reader of one of some words."""

    def read_choice(place: str, value: Any) -> str:
        known = isinstance(value, str) and value in choices
        need(known, place, f"it must be one of {', '.join(choices)}, not {shown(value)}: update qvit if it is newer")
        return str(value)

    return read_choice


def list_of(read: Reader) -> Reader:
    """Return a reader of a list of at least one value."""

    def read_list(place: str, value: Any) -> tuple[Any, ...]:
        need(isinstance(value, list) and len(value) > 0, place, f"it must be a list, not {shown(value)}")
        return tuple(read(f"{place}[{index}]", item) for index, item in enumerate(value))

    return read_list


def record_of(kind: type[Record]) -> Reader:
    """Return a reader of a record."""
    return lambda place, value: read_record(kind, place, value)


def field(read: Reader, **default: Any) -> Any:
    """Return a dataclass field that is checked by ``read``; with ``default=...`` it may be absent."""
    return dataclasses.field(metadata={"read": read}, **default)


def read_record(kind: type[Record], place: str, data: Any) -> Record:
    """Read a record from a JSON object; ``None`` stands for an absent part only where that is its default.

    Raises:
        PackedFileError: naming the field that is absent, unknown or cannot be meant.
    """
    need(isinstance(data, dict), place, f"it must be an object, not {shown(data)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        need(name in fields, place, f"it has an unknown field {shown(name)}: update qvit if the file is newer")
    values = {}
    for name, item in fields.items():
        if name in data and data[name] is not None:
            values[name] = item.metadata["read"](f"{place}.{name}", data[name])
        else:
            need(item.default is not dataclasses.MISSING, place, f"its {name} is absent")
    return kind(**values)


def plain(record: Any) -> dict[str, Any]:
    """Return a record as plain data for JSON, without the fields that have their default."""
    data: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if value != item.default:
            data[item.name] = _plain_value(value)
    return data


def _plain_value(value: Any) -> Any:
    if isinstance(value, Bits):
        return list(value)
    if dataclasses.is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple):
        # Where a list holds operations of several kinds, each says which it is.
        return [{"op": item.op, **plain(item)} if hasattr(item, "op") else _plain_value(item) for item in value]
    return value


def unknown(names: Mapping[str, Any], name: str) -> str:
    """Return the sentence that refuses an operation of another version by name."""
    return f"it needs operation {shown(name)}, and this qvit knows {', '.join(names)}: update qvit"
