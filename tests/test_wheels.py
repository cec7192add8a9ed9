"""What is said of wheels and packages in one place is what is said in the others."""

from __future__ import annotations

import os
import re
import subprocess
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


def test_a_package_has_one_lower_bound_wherever_it_is_asked_for() -> None:
    project = PYPROJECT[PYPROJECT.index("\ndependencies") : PYPROJECT.index("[project.scripts]")]
    bounds: dict[str, set[str]] = {}
    for name, bound in re.findall(r'"([\w.-]+)(?:\[\w+\])?([<>=~!][^"]+)"', project):
        bounds.setdefault(re.sub(r"[-_.]+", "-", name.lower()), set()).add(bound)
    assert len(bounds) > 20
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


PYTHON = """#!/bin/sh
echo "$@" >>"$0.log"
case "$*" in *uv*--version) exit {status} ;; *install*) exit 3 ;; esac
"""
"""Stands for Python, with uv or without, and ends the script that installs."""


def test_the_study_is_installed_by_uv_where_there_is_uv(tmp_path: Path) -> None:
    for status, expected in ((0, "-m uv pip install --python {python} "), (1, "-m pip install ")):
        python = tmp_path / f"python{status}"
        python.write_text(PYTHON.format(status=status))
        python.chmod(0o755)
        command = ["sh", ROOT / "benchmarks" / "study_gpu.sh", "archive", tmp_path / "state", "1", tmp_path / "results"]
        done = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, check=False)
        assert done.returncode == 3
        assert Path(f"{python}.log").read_text().splitlines()[-1].startswith(expected.format(python=python))


def pythons(workflow: str, job: str) -> list[str]:
    text = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    return yaml.safe_load(text)["jobs"][job]["strategy"]["matrix"]["python"]
