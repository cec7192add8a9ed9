"""The Python examples of the README and the guide run as they stand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
GUIDE = README.parent / "docs" / "guide.md"


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 13
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert (tmp_path / "model.safetensors").stat().st_size < 4e6
    logits = names["logits"]
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (4, 1000)
    assert np.isfinite(logits).all()


def test_the_web_server_of_the_guide_answers(
    tmp_path: Path, packed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n# app.py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "model.safetensors").write_bytes(packed_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    image = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(image, "png")

    def answer(body: bytes) -> tuple[str, dict[str, Any]]:
        statuses: list[str] = []
        environ = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        (content,) = names["app"](environ, lambda status, headers: statuses.append(status))
        return statuses[0], json.loads(content)

    status, classes = answer(image.getvalue())
    assert status == "200 OK"
    assert len(classes) == 5
    assert sum(classes.values()) <= 1.001
    status, refusal = answer(image.getvalue()[:40])
    assert (status, list(refusal)) == ("400 Bad Request", ["error"])
