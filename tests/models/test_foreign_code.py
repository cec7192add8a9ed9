"""Files that call functions when they are unpickled: nothing of them is run."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreign_weights import EXPECTED, load, refusal, trained


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


def malicious(target: Path) -> dict[str, Any]:
    import importlib
    import subprocess

    made = f"open({str(target)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {target}"),
        "subprocess": Calls(subprocess.getoutput, f"touch {target}"),
        "eval": Calls(eval, made),
        "exec": Calls(exec, made),
        "open": Calls(open, str(target), "w"),
        "touch": Calls(Path.touch, target),
        "import": Calls(importlib.import_module, "antigravity"),
        "numpy": Calls(np.fromfile, str(target)),
        "torch.load": Calls(torch.load, str(target)),
        "nested": Calls(getattr, Calls(importlib.import_module, "os"), "system"),
        "partial": Calls(__import__("functools").partial, eval, made),
    }


@pytest.mark.parametrize("kind", malicious(Path("x")))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["args", "weight", "all"])
def test_no_code_in_a_file_is_run(tmp_path: Path, kind: str, zipped: bool, where: str) -> None:
    target = tmp_path / "made"
    evil = malicious(target)[kind]
    weights: dict[str, Any] = dict(trained().state_dict())
    content: Any = {"state_dict": weights, "args": argparse.Namespace(lr=evil) if where == "args" else None}
    if where == "weight":
        weights["head.weight"] = evil
    torch.save(evil if where == "all" else content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    before = set(sys.modules)
    if zipped and where == "args" and kind not in ("os.system", "touch"):  # which needs two calls
        load(tmp_path / "evil.pth", EXPECTED)  # what stands beside the weights is never looked at
    else:
        refusal(tmp_path / "evil.pth", EXPECTED)
    assert not target.exists()
    assert "antigravity" not in set(sys.modules) - before


def test_call_into_the_system_is_named(
    tmp_path: Path,
) -> None:
    torch.save({"model": Calls(os.system, "true")}, tmp_path / "evil.pth")
    text = refusal(tmp_path / "evil.pth", EXPECTED)
    assert f"holds a call of '{os.name}.system': qvit runs no code of a file" in text


def test_too_many_classes_are_refused(
    tmp_path: Path,
) -> None:
    pickled = b"\x80\x02(" + b"".join(b"cmodule%d\nname\n" % n for n in range(101)) + b"t."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as file:
        file.writestr("w/data.pkl", pickled)
        file.writestr("w/version", "3\n")
    assert "names 101 classes of other programs, the limit is 100" in refusal(tmp_path / "w.pth", EXPECTED)
