from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from commands import run
from qvit import __version__
from qvit.runtime.engine import instruction_sets
from qvit.runtime.environment import environment
from test_import import WITHOUT_TORCH
from test_import import run as run_alone


def test_json_has_what_a_report_needs() -> None:
    done = run("report-env", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert (found["qvit"], found["python"]) == (__version__, platform.python_version())
    assert found["instruction_sets"] == instruction_sets()
    assert int(found["processors"]) >= 1
    assert found["cpu"]
    assert {"numpy", "safetensors", "torch", "timm", "onnx"} <= found["packages"].keys()
    assert not {"pytest", "ruff", "gunicorn", "qvit"} & found["packages"].keys()
    assert all(found["packages"][name] for name in ("numpy", "torch"))


def test_text_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvit.runtime.environment._version_of", lambda name: None if name == "timm" else "1.2")
    lines = dict(line.split(": ", 1) for line in run("report-env").out.splitlines())
    assert lines["qvit"] == __version__
    assert lines["instruction_sets"].split(", ") == instruction_sets()
    assert (lines["numpy"], lines["timm"]) == ("1.2", "not installed")


def test_no_place_and_no_host_is_told() -> None:
    text = json.dumps(environment())
    for private in (Path.home(), Path.cwd(), sys.prefix, platform.node()):
        assert len(str(private)) < 4 or str(private) not in text


def test_it_needs_no_torch() -> None:
    blocked = ["torch", "timm", "torchvision", "accelerate", "yaml", "scipy", "matplotlib"]
    out = run_alone(
        WITHOUT_TORCH.format(blocked=blocked)
        + "import sys; sys.argv = ['qvit', 'report-env']; import qvit.cli.app as app\n"
        "try:\n    app.main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert out.startswith(f"qvit: {__version__}\n")
