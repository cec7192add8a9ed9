"""Names and sentences: variables are nouns, and what there is one of for each of something is per that."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PRONOUNS = {"each", "few", "its", "mine", "none", "one", "ours", "own", "some", "theirs", "these", "those", "which"}
PER = re.compile(
    r"(?<!hich )\b([Oo]ne|[Oo]nce|scales?|values?|rows?|lines?|columns?|records?|[Ii]mages|batches|[Ss]teps|ms) an? "
    r"(output channel|optimizer step|channel|head|token|image|step|epoch|second|block|model|tensor|picture|run)\b"
)


def variables(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a module gives a value: variables, attributes, arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


@pytest.mark.parametrize("folder", FOLDERS)
def test_variables_are_nouns_and_not_pronouns(folder: str) -> None:
    modules = [path for path in MODULES if path.is_relative_to(ROOT / folder)]
    assert modules
    found = [(path, line, name) for path in modules for line, name in variables(path) if name.strip("_") in PRONOUNS]
    assert not found


def test_what_each_has_is_told_with_per() -> None:
    found = {path.name: match.group() for path in MODULES for match in PER.finditer(path.read_text())}
    assert not found
