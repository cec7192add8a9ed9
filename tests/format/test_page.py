"""docs/format.md says everything that the code reads: operations, fields, choices, tensors, and its example is one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from family_programs import FAMILIES
from qvit.format import header
from qvit.format.branches import BRANCHES, Attention, Mlp, Residual, Rotary
from qvit.format.fields import MAX_SIZE, MAX_TEXT
from qvit.format.header import check_header, parse
from qvit.format.ops import ACTIVATIONS, Layer
from qvit.format.packed import MAX_HEADER
from qvit.format.program import MAX_PIXELS, OPERATIONS

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)}
RECORDS = {**OPERATIONS, **BRANCHES, "layer": Layer, "rotary": Rotary}


def words(section: str) -> set[str]:
    """Return what stands in a section as code."""
    return {word for code in re.findall(r"`([^`\n]+)`", SECTIONS[section]) for word in re.split(r"[^\w.]+", code)}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_in_the_section_of_its_operation(name: str) -> None:
    fields = {entry.name for entry in dataclasses.fields(RECORDS[name])}
    assert fields <= words(name)
    table = SECTIONS[name].partition("| tensor")[0]
    rows = [row.split("|")[1] for row in re.findall(r"^\|.*\|$", table, flags=re.MULTILINE)[2:]]
    assert {field for row in rows for field in re.findall(r"`(\w+)`", row)} == fields


def choices() -> list[tuple[str, str]]:
    """Return every choice that the code offers, as its refusal of another one lists them."""
    found = []
    for name, kind in RECORDS.items():
        for entry in dataclasses.fields(kind):
            for known in getattr(entry.metadata["read"], "__closure__", None) or ():
                if isinstance(known.cell_contents, tuple):
                    found += [(name, choice) for choice in known.cell_contents if isinstance(choice, str)]
    return found


@pytest.mark.parametrize(("section", "choice"), choices())
def test_every_choice_is_in_the_section_of_its_operation(section: str, choice: str) -> None:
    assert choice in words(section)


def test_choices_are_found() -> None:
    assert {("mlp", activation) for activation in ACTIVATIONS} < set(choices())
    assert {("norm", "rms"), ("attention", "affine"), ("rotary", "halves"), ("pool", "avgmax")} < set(choices())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_in_the_section_of_its_operation(family: str) -> None:
    for operation, x in FAMILIES[family].walk():
        parts = operation.branches if isinstance(operation, Residual) else (operation,)
        for part in parts:
            layers = {layer.name for layer in part.layers()}
            rotary = part.rotary if isinstance(part, Attention) else None
            for name, dtype, _ in part.entries(x):
                owner, _, kind = name.rpartition(".")
                part_name = getattr(part, "name", None)
                if owner in layers:
                    section, called = "layer", f"LAYER.{kind}"
                elif rotary is not None and owner == rotary.name:
                    section, called = "rotary", f"NAME.{kind}"
                elif kind in ("weight", "bias"):
                    section, called = "norm", f"NORM.{kind}"
                elif part_name is not None and not isinstance(part, Mlp):
                    section, called = part.op, f"NAME.{name.removeprefix(f'{part_name}.')}"
                else:
                    section, called = part.op, name
                row = next(row for row in SECTIONS[section].splitlines() if f"`{called}`" in row)
                assert ("U8" if dtype.kind == "u" else "F32") in row


def test_header_is_described() -> None:
    described = words("The file")
    assert {*header._KEYS, *header._PREPROCESSING, *header.INTERPOLATIONS, *header.CROP_MODES} <= described


def test_limits_are_those_of_the_code() -> None:
    refused = SECTIONS["What a reader must refuse"]
    assert MAX_HEADER == 4 * 2**20
    assert "4 MiB" in refused
    assert f"longer than {MAX_TEXT} letters" in refused
    assert str(MAX_SIZE) in refused
    assert MAX_PIXELS == 2**26
    assert "2^26" in refused
    assert f"{header.SMALLEST_STD:.4f} to {header.LARGEST_STD:.0f}" in refused
    assert f"version {header.VERSION}" in PAGE.splitlines()[0]


def test_example_is_a_header() -> None:
    text = re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    assert text is not None
    program = check_header(parse(text[1], "the example"))
    assert program.classifies
    written = json.loads(text[1])["program"]
    assert program.to_list() == written
