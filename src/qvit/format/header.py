"""The header of a packed file: JSON that is checked, field by field, before anything is done with it.

``version``, ``checksum``, ``architecture`` (:class:`qvit.format.architecture.Architecture`), ``bits`` (name to
[weight bits, activation bits]), ``preprocessing``, ``classes`` and ``origin``. No PyTorch here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qvit.config import Bits
from qvit.errors import PackedFileError
from qvit.files import first_line
from qvit.format.architecture import OPERANDS, Architecture, is_bits, is_number, shown

VERSION = 1
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
_KEYS = ("version", "checksum", "architecture", "bits", "preprocessing", "classes", "origin")
_PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


def parse(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object ``text``; nothing that has two meanings or none passes.

    Raises:
        PackedFileError: for no JSON, no object, a name twice, NaN, text that is no Unicode, or too deep a nesting.
    """

    def no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise PackedFileError(f"{what} has {shown(next(n for n in names if names.count(n) > 1))} twice.")
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


def check_header(header: dict[str, Any], entries: int) -> tuple[Architecture, dict[str, Bits]]:
    """Return the architecture and the bits of a header, all of which is checked.

    Args:
        header: what :func:`parse` returned.
        entries: number of tensors in the file.

    Raises:
        PackedFileError: naming what is absent, unknown, cannot be meant or does not fit the rest.
    """
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise PackedFileError(f"version is {shown(version)}, this qvit reads {VERSION}: update qvit.")
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
    architecture = Architecture.from_dict(header["architecture"])
    # Every branch has at least ten entries. Known before anything is listed, so that no number costs memory.
    if architecture.depth * architecture.parallel > entries:
        raise PackedFileError(
            f"architecture.depth: {architecture.depth} blocks of {architecture.parallel} branches cannot be in a file "
            f"of {entries} entries."
        )
    if not isinstance(header["origin"], dict):
        raise PackedFileError(f"origin must be an object, not {shown(header['origin'])}.")
    check_classes(header["classes"], architecture.class_count)
    check_preprocessing(header["preprocessing"], (architecture.channels, *architecture.image_size))
    return architecture, _check_bits(header["bits"], architecture)


def _check_bits(data: Any, architecture: Architecture) -> dict[str, Bits]:
    if not isinstance(data, dict):
        raise PackedFileError(f"bits must be an object, not {shown(data)}.")
    bits = {}
    for name in architecture.bit_names():
        pair = data.get(name)
        if not isinstance(pair, list) or len(pair) != 2 or not all(is_bits(value) for value in pair):
            raise PackedFileError(f"bits.{name} must be two whole numbers from 2 to 8, not {shown(pair)}.")
        bits[name] = Bits(*pair)
        if name.rpartition(".")[2] in OPERANDS and pair[0] != pair[1]:
            raise PackedFileError(f"bits.{name} must be twice the same number, not {pair}.")
    for name in data:
        if name not in bits:
            raise PackedFileError(f"bits names {shown(name)}, which the architecture does not have.")
    return bits


def check_classes(classes: Any, count: int) -> None:
    """Refuse what is no list of ``count`` class names.

    Raises:
        PackedFileError: saying why.
    """
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise PackedFileError(f"classes must be a list of names, not {shown(classes)}.")
    if len(classes) != count:
        raise PackedFileError(f"classes has {len(classes)} names, the model has {count} logits.")


def check_preprocessing(data: Any, size: tuple[int, int, int]) -> None:
    """Refuse a preprocessing that is not whole, or not for images of ``size`` (channels, height, width).

    Raises:
        PackedFileError: naming the field.
    """

    def refuse(field: str, must: str) -> None:
        raise PackedFileError(f"preprocessing.{field} must be {must}, not {shown(data[field])}.")

    if not isinstance(data, dict) or set(data) != set(_PREPROCESSING):
        raise PackedFileError(f"preprocessing must have {', '.join(_PREPROCESSING)}, it is {shown(data)}.")
    if data["input_size"] != list(size):
        refuse("input_size", f"{list(size)} as in the architecture")
    for field in ("mean", "std"):
        values = data[field]
        if not isinstance(values, list) or len(values) != size[0] or not all(is_number(value) for value in values):
            refuse(field, f"{size[0]} numbers, one a channel")
    if min(data["std"]) <= 0:
        refuse("std", "positive")
    # Images are resized to size / crop_pct before the centre is cut out.
    if not is_number(data["crop_pct"]) or not 0.1 <= data["crop_pct"] <= 1:
        refuse("crop_pct", "a number from 0.1 to 1")
    if data["crop_mode"] not in CROP_MODES:
        refuse("crop_mode", f"one of {', '.join(CROP_MODES)}")
    if data["interpolation"] not in INTERPOLATIONS:
        refuse("interpolation", f"one of {', '.join(INTERPOLATIONS)}")
