"""The header of a packed file: JSON that is checked, field by field, before anything is done with it.

``version``, ``checksum``, ``name``, ``input``, ``program`` (:mod:`qvit.format.program`), ``preprocessing``, ``classes``
and ``origin``. No PyTorch here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qvit.errors import PackedFileError
from qvit.files import first_line
from qvit.format.fields import is_number, shown
from qvit.format.program import Program, read_program

VERSION = 2
SMALLEST_STD, LARGEST_STD = 1e-4, 1e4
"""Of a channel; smaller ones would turn pixels into infinities."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
_KEYS = ("version", "checksum", "name", "input", "program", "preprocessing", "classes", "origin")
_PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


def parse(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object ``text``; nothing that has two meanings or none passes.

    Raises:
        PackedFileError: for no JSON, no object, a name twice, NaN, text that is no Unicode, or too deep a nesting.
    """

    def no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise PackedFileError(f"{what} has {shown(twice)} twice.")
        return result

    def no_constant(constant: str) -> None:
        raise PackedFileError(f"{what} holds {constant}.")

    try:
        data = json.loads(text, object_pairs_hook=no_repetition, parse_constant=no_constant)
    except PackedFileError:
        raise
    except RecursionError:
        raise PackedFileError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise PackedFileError(f"{what} is no JSON: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise PackedFileError(f"{what} must be an object, not {shown(data)}.")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no terminal can print and no checksum be taken of
        raise PackedFileError(f"{what} holds text that is no Unicode.") from None
    return data


def check_header(header: dict[str, Any]) -> Program:
    """Return the program of a header, all of which is checked.

    Args:
        header: what :func:`parse` returned.

    Raises:
        PackedFileError: naming what is absent, unknown, cannot be meant or does not fit the rest.
    """
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise PackedFileError(f"version is {shown(version)}, this qvit reads {VERSION}: update qvit.")
    if version == 1 and type(version) is int:
        raise PackedFileError("version is 1, which was never released: export the checkpoint again (qvit export).")
    if type(version) is not int or version != VERSION:
        raise PackedFileError(f"version must be {VERSION}, not {shown(version)}.")
    for name in _KEYS:
        if name not in header:
            raise PackedFileError(f"{name} is absent from the header.")
    for name in header:
        if name not in _KEYS:
            raise PackedFileError(f"the header has an unknown entry {shown(name)}.")
    checksum = header["checksum"]
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{8}", checksum):
        raise PackedFileError(f"checksum must be 8 hexadecimal digits, not {shown(checksum)}.")
    program = read_program(header["name"], header["input"], header["program"])
    if not isinstance(header["origin"], dict):
        raise PackedFileError(f"origin must be an object, not {shown(header['origin'])}.")
    check_classes(header["classes"], program)
    check_preprocessing(header["preprocessing"], program.input)
    return program


def check_classes(classes: Any, program: Program) -> None:
    """Refuse what is no list of class names, one per logit; a feature extractor has none.

    Raises:
        PackedFileError: saying why.
    """
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise PackedFileError(f"classes must be a list of names, not {shown(classes)}.")
    count = program.output if program.classifies else 0
    if len(classes) != count:
        what = f"has {count} logits" if program.classifies else "is a feature extractor and has none"
        raise PackedFileError(f"classes has {len(classes)} names, the model {what}.")


def check_preprocessing(data: Any, size: tuple[int, int, int]) -> None:
    """Refuse a preprocessing that is not whole, or not for images of ``size`` (channels, height, width).

    Raises:
        PackedFileError: naming the field.
    """

    def refuse(field: str, must: str) -> None:
        raise PackedFileError(f"preprocessing.{field} must be {must}, not {shown(data[field])}.")

    if not isinstance(data, dict) or set(data) != set(_PREPROCESSING):
        raise PackedFileError(f"preprocessing must have {', '.join(_PREPROCESSING)}, it is {shown(data)}.")
    sides = data["input_size"]
    if sides != list(size) or not all(type(side) is int for side in sides):  # 8.0 and true are equal to whole numbers
        refuse("input_size", f"{list(size)} as in the program")
    for field in ("mean", "std"):
        values = data[field]
        if not isinstance(values, list) or len(values) != size[0] or not all(is_number(value) for value in values):
            refuse(field, f"{size[0]} numbers, one per channel")
    if not all(SMALLEST_STD <= value <= LARGEST_STD for value in data["std"]):
        refuse("std", f"from {SMALLEST_STD} to {LARGEST_STD}, as pixels from 0 to 1 have it")
    if not all(abs(value) <= LARGEST_STD for value in data["mean"]):
        refuse("mean", f"at most {LARGEST_STD} from 0, as pixels from 0 to 1 have it")
    # Images are resized to size / crop_pct before the centre is cut out.
    if not is_number(data["crop_pct"]) or not 0.1 <= data["crop_pct"] <= 1:
        refuse("crop_pct", "a number from 0.1 to 1")
    if data["crop_mode"] not in CROP_MODES:
        refuse("crop_mode", f"one of {', '.join(CROP_MODES)}")
    if data["interpolation"] not in INTERPOLATIONS:
        refuse("interpolation", f"one of {', '.join(INTERPOLATIONS)}")
