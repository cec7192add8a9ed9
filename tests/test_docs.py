"""The pages are as the repository is: what cites a section finds it, and what a page links or names is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
SOURCES = sorted(
    path
    for folder in ("src", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyi", ".h", ".cpp", ".yaml", ".sh") and path != Path(__file__)
)
CITATION = re.compile(
    r"docs/(?P<page>\w+\.md), sections? (?P<numbers>\d+(?:, \d+)*(?: and \d+)?)(?:: \"(?P<quote>[^\"]+)\")?"
)


def sections(page: Path) -> dict[str, str]:
    """Return the numbered sections of a page, by number."""
    parts = re.split(r"^## (?=.)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {number[1]: part for part in parts if (number := re.match(r"(\d+)\. ", part))}


def unwrapped(path: Path) -> str:
    """Return a file's text with every comment and docstring in one line."""
    return re.sub(r"\s*\n\s*(?:(?:#|//) ?)?", " ", path.read_text(encoding="utf-8"))


def citations() -> Iterator[tuple[Path, re.Match[str]]]:
    for path in SOURCES:
        for found in CITATION.finditer(unwrapped(path)):
            yield path, found


def test_every_citation_is_of_a_section_that_is_there() -> None:
    found = list(citations())
    assert len(found) > 15
    for path, citation in found:
        there = sections(ROOT / "docs" / citation["page"])
        for number in re.findall(r"\d+", citation["numbers"]):
            assert number in there, f"{path}: {citation[0]}"
            if citation["quote"]:
                assert citation["quote"] in " ".join(there[number].split()), f"{path}: {citation[0]}"


def test_the_method_is_cited_by_section_and_in_one_way() -> None:
    for path in SOURCES:
        text = unwrapped(path)
        own = [found for found in CITATION.finditer(text) if found["page"] == "method.md"]
        assert len(own) == text.count("method.md"), f"{path}: write docs/method.md, section N"


def test_every_section_of_the_method_has_its_number() -> None:
    numbers = list(sections(ROOT / "docs" / "method.md"))
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]


def anchors(page: Path) -> set[str]:
    """Return the names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_repository_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.-])((?:src|tests|benchmarks|docs)/[\w./-]*\w/?)", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


DIFFS = [
    [(name, body.splitlines()) for name, body in re.findall(r"--- (.*)\n((?:[ +-](?!--).*\n)*)", block)]
    for block in re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
]
ACTIVATION, FAMILY = DIFFS
"""Two diffs: of an activation function to come, and of a family that is there. ``...`` stands for what is left out."""


def assert_in_order(name: str, lines: list[str]) -> None:
    """Check that a file has ``lines``, in their order."""
    place, given = 0, (ROOT / name).read_text(encoding="utf-8").splitlines()
    for line in lines:
        pattern = re.escape(line).replace(re.escape("..."), ".*")
        found = next((n for n in range(place, len(given)) if re.fullmatch(pattern, given[n])), None)
        assert found is not None, f"{name} has no line after {place}: {line}"
        place = found + 1


@pytest.mark.parametrize(("name", "lines"), ACTIVATION)
def test_the_diff_of_an_activation_function_begins_at_what_is_there(name: str, lines: list[str]) -> None:
    assert_in_order(name, [line[1:] for line in lines if not line.startswith("+")])
    assert any(line.startswith("+") for line in lines)


@pytest.mark.parametrize(("name", "lines"), FAMILY)
def test_the_diff_of_a_family_ends_at_what_is_there(name: str, lines: list[str]) -> None:
    assert_in_order(name, [line[1:] for line in lines if not line.startswith("-")])


def test_both_diffs_are_read() -> None:
    assert len(ACTIVATION) == 5
    assert len(FAMILY) == 3
