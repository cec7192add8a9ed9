"""What is said of wheels in one place is what is said in the others."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
STABLE = (3, 12)
"""From here on nanobind has a stable ABI."""


def test_each_python_has_a_wheel_and_is_installed_with_it() -> None:
    built = re.findall(r"cp3(\d+)-\*", PYPROJECT)
    (lowest,) = re.findall(r'requires-python = ">=3\.(\d+)"', PYPROJECT)
    assert [int(minor) for minor in built] == list(range(int(lowest), STABLE[1] + 1))
    assert 'wheel.py-api = "cp{}{}"'.format(*STABLE) in PYPROJECT
    assert pythons("wheels.yml", "install") == pythons("tests.yml", "tests")


def test_who_develops_has_the_tools_that_the_build_asks_for() -> None:
    (requires,) = re.findall(r"^requires = \[(.*)\]", PYPROJECT, re.MULTILINE)
    (cmake,) = re.findall(r'^cmake.version = "(.*)"', PYPROJECT, re.MULTILINE)
    for tool in [*re.findall(r'"(.*?)"', requires), f"cmake{cmake}"]:
        assert f'    "{tool}",' in PYPROJECT


def pythons(workflow: str, job: str) -> list[str]:
    text = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    return yaml.safe_load(text)["jobs"][job]["strategy"]["matrix"]["python"]
