"""The pages are as the repository is: what cites a section finds it, and what a page links or names is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import qvit
from qvit.cli import app as cli

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
SOURCES = sorted(
    path
    for folder in ("src", "tests", "benchmarks", "examples")
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
        citations = [found for found in CITATION.finditer(text) if found["page"] == "method.md"]
        assert len(citations) == text.count("method.md"), f"{path}: write docs/method.md, section N"


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
    for name in re.findall(r"(?<![\w/.-])((?:src|tests|benchmarks|examples|docs)/[\w./-]*\w/?)", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    # A path in the page's own words for src/qvit's, such as `nn/quantizer.py`.
    for name in re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|cpp|h))`", text):
        assert (ROOT / name).exists() or (ROOT / "src" / "qvit" / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_the_package_that_is_written_is_there(page: Path) -> None:
    for name in re.findall(r"(?<![\w.])qvit(?:\.[a-z]\w*)+", page.read_text(encoding="utf-8")):
        if (ROOT / "src" / "qvit" / "web" / name).exists():  # qvit.js
            continue
        found, *rest = importlib.import_module("qvit"), *name.split(".")[1:]
        for part in rest:
            if inspect.ismodule(found) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_section_that_a_page_cites_is_there(page: Path) -> None:
    for name, number in re.findall(r"\]\((\w+\.md)\),? sections? (\d+)", page.read_text(encoding="utf-8")):
        assert number in sections(page.parent / name), f"{page.name}: {name}, section {number}"


COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def command_lines(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Yield the words of every command of a page, and whether it is a line of its own: then it is to be whole."""
    text = re.sub(r"\\?\n {8,}", " ", page.read_text(encoding="utf-8"))  # a line that is indented more goes on
    blocks = re.findall(r"^(?: {4,}|\t)(.*)$", text, re.MULTILINE)
    for fence in re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        blocks += fence.splitlines()
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line, is_block in [*((block, True) for block in blocks), *((code, False) for code in inline)]:
        with_options = re.sub(r"\[(--[^\]]+)\]", r"\1", line.split(" # ")[0])  # that may be left out
        for part in re.split(r" && | \| |; ", with_options):
            plain = re.sub(r"^(?:[A-Z_]+=\S+ )*", "", part)
            plain = re.sub(r"^torchrun .*-m qvit\.cli(?= )", "qvit", plain)
            plain = re.sub(r"^torchrun .*(?=examples/)", "python ", plain)
            if re.match(r"(?:qvit|python|make)\s", plain):
                yield shlex.split(plain), is_block


def check_command(program: str, arguments: list[str], whole: bool) -> None:
    """Check that a command line means something: its command and its options; if it is ``whole``, what they take."""
    if program == "make":
        assert set(arguments) <= TARGETS
    elif program == "python":
        if arguments[0].startswith(("benchmarks/", "examples/")):
            code = (ROOT / arguments[0]).read_text(encoding="utf-8")
            for option in (word for word in arguments[1:] if word.startswith("--")):
                assert f'"{option}"' in code, option
    elif arguments[0] not in ("--help", "--version", "COMMAND"):
        assert arguments[0] in COMMANDS
        command = COMMANDS[arguments[0]]
        known = {name for parameter in command.params for name in parameter.opts}
        for option in (word.partition("=")[0] for word in arguments[1:] if word.startswith("--")):
            assert option in {*known, "--help"}, option
        if whole and not {"...", "--help"} & {*arguments}:
            command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_exists_with_its_options(page: Path) -> None:
    for (program, *arguments), is_block in command_lines(page):
        try:
            check_command(program, arguments, is_block)
        except (AssertionError, cli._ClickException) as error:
            raise AssertionError(f"{page.name}: {program} {' '.join(arguments)}: {error!r}") from error


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_every_command_can_be_typed(name: str) -> None:
    examples = re.findall(r"^\s+(?:torchrun .*-m qvit\.cli|qvit) (.*)$", COMMANDS[name].help, re.MULTILINE)
    assert examples
    for example in examples:
        check_command("qvit", shlex.split(example), whole=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_it_is_run_and_stands_on_the_page(path: Path) -> None:
    assert f"examples/{path.name}" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    commands = re.findall(r"^  (?:python|torchrun .*) (examples/.*)$", said, re.MULTILINE)
    assert commands
    for program, *arguments in map(shlex.split, commands):
        assert program == f"examples/{path.name}"
        check_command("python", [program, *arguments], whole=True)


def test_the_script_for_a_gpu_calls_benchmarks_with_options_that_they_have(tmp_path: Path) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\nprintf "%s " "$@" >>"{calls}"\necho >>"{calls}"\n')
    python.chmod(0o755)
    script = [str(ROOT / "benchmarks" / "training_gpu.sh"), "results", "model", "data", "recipe", "--batch", "2"]
    subprocess.run(["sh", *script], cwd=tmp_path, env={**os.environ, "PYTHON": str(python)}, check=True)
    commands = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert [Path(program).name for program, *_ in commands] == ["training.py", "loading.py"]
    assert commands[0][-2:] == ["--batch", "2"]
    for program, *arguments in commands:
        check_command("python", [str(Path(program).relative_to(ROOT)), *arguments], whole=True)


def test_commands_are_found_and_what_is_wrong_with_them_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    qvit eval x.pt\n        --data digits [--workers 2] && A=1 qvit info m\n"
        "    B=2 torchrun -x 8 -m qvit.cli train m\n    torchrun -x 8 examples/a.py --b\n`make\ntest`\n"
    )
    assert list(command_lines(page)) == [
        (["qvit", "eval", "x.pt", "--data", "digits", "--workers", "2"], True),
        (["qvit", "info", "m"], True),
        (["qvit", "train", "m"], True),
        (["python", "examples/a.py", "--b"], True),
        (["make", "test"], False),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "qvit evaluate x.pt --data digits",
        "qvit eval x.pt --data digits --date today",
        "qvit eval x.pt",
        "qvit eval x.pt --data digits --workers many",
        "make tests",
        "python benchmarks/engine.py --nothing",
    ],
)
def test_a_command_that_is_wrong_is_seen(line: str) -> None:
    program, *arguments = line.split()
    with pytest.raises((AssertionError, cli._ClickException)):
        check_command(program, arguments, whole=True)


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


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_what_a_person_calls(path: Path) -> None:
    for name, job in read_yaml(path)["jobs"].items():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        targets = [command.split()[1:] for command in commands if command.startswith("make ")]
        assert targets, name
        for target in targets:
            assert set(target) <= TARGETS, name


def test_every_python_that_is_promised_is_tested() -> None:
    (path,) = (path for path in WORKFLOWS if path.name == "tests.yml")
    jobs = read_yaml(path)["jobs"]
    (lowest,) = re.findall(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert jobs["tests"]["strategy"]["matrix"]["python"][0] == lowest
    assert jobs["lowest"]["steps"][1]["with"]["python-version"] == lowest


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_asks_with_commands_that_are_there(path: Path) -> None:
    form = read_yaml(path)
    questions = form.get("body", [])
    assert len({question["id"] for question in questions}) == len(questions)
    assert all(question["attributes"]["label"] for question in questions)
    for command in re.findall(r"qvit ([a-z-]+)", str(form)):
        assert command in COMMANDS


def test_formatters_before_a_commit_are_those_of_lint() -> None:
    (repository,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in repository["hooks"]:
        (requirement,) = hook["additional_dependencies"]
        assert f'"{requirement}"' in PYPROJECT, hook["id"]


def test_the_citation_says_what_the_package_says() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f'license = "{citation["license"]}"' in PYPROJECT


def test_one_version_is_told_everywhere() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day, tag = re.findall(r"^## ([\d.]+), (.*) \(tag `v(.*)`\)$", changes, re.MULTILINE)[0]
    citation = read_yaml(ROOT / "CITATION.cff")
    package = json.loads((ROOT / "src" / "qvit" / "web" / "package.json").read_text(encoding="utf-8"))
    assert {version, tag, citation["version"], package["version"]} == {qvit.__version__}
    released = citation["date-released"]
    assert day == f"{released.day} {released:%B %Y}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_can_be_read_at_once_and_says_who_writes_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{page.name}: split it by topic"
    for name in re.findall(r"^<!-- study: (\w+) -->$", text, re.MULTILINE):
        assert f"--results docs/study/{name}.jsonl --document docs/{page.name}\n" in text, name


def test_the_guide_lists_every_command() -> None:
    listed = re.findall(
        r"^\| `qvit ([a-z-]+)` \|", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(COMMANDS)


def test_the_readme_is_two_screens_and_has_the_front_door_first() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert re.search(r"^    (.*)$", text, re.MULTILINE)[1].startswith("qvit quantize ")  # type: ignore[index]


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    added = set(re.findall(r'"([a-z]+\.md)"', (ROOT / "docs" / "site.py").read_text(encoding="utf-8")))
    assert listed == {page.name for page in DOCS} | added
    assert len(added) == 1 + len(list(ROOT.glob("*.md")))  # and the page of the public names
