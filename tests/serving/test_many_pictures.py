"""Pictures by the million: the function for Spark on the page, and the example for Ray Data where Ray is installed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvit.runtime.engine import load

ROOT = Path(__file__).parents[2]
KINDS = ("png", "jpeg")


def pictures(count: int) -> list[bytes]:
    """Return files of pictures, PNG and JPEG in turn, the last one cut."""
    rng, contents = np.random.default_rng(0), []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 31, 3), dtype=np.uint8)).save(file, KINDS[number % 2].upper())
        contents.append(file.getvalue())
    return [*contents[:-1], contents[-1][:90]]


def test_the_function_for_spark_takes_and_gives_data_frames(
    packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = pytest.importorskip("pandas")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    (tmp_path / "model.safetensors").write_bytes(packed_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), names)
    contents = pictures(6)[:5]
    frames = [  # as Spark's binaryFile hands them out
        pandas.DataFrame({"path": [f"{at}.png", f"{at + 1}.png"], "length": 1, "content": contents[at : at + 2]})
        for at in (0, 2)
    ]
    classified = pandas.concat(names["classify"](iter(frames)))
    expected = [best[0][0] for best in load(packed_file).predict(contents[:4])]
    assert list(classified.columns) == ["path", "name"]
    assert list(classified.path) == [f"{at}.png" for at in range(4)]
    assert list(classified.name) == expected


def test_the_example_for_ray_classifies_with_two_workers(packed_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not of the extra dev: it is larger than the rest of it")
    import pyarrow.parquet

    contents = pictures(6)
    shard = tmp_path / "pictures.tar"
    with tarfile.open(shard, "w") as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number}.{KINDS[number % 2]}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    command = [sys.executable, ROOT / "examples" / "classify_with_ray.py", packed_file, shard]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", tmp_path / "classes", "--workers", "2"], check=True, env=environment)
    rows = {row["name"]: row for row in pyarrow.parquet.read_table(tmp_path / "classes").to_pylist()}
    engine = load(packed_file)
    files = [f"{number}.{KINDS[number % 2]}" for number in range(6)]  # kinds of a shard are columns of its samples
    assert sorted(rows) == files
    for file, content in zip(files, contents[:-1], strict=False):
        (((name, probability),),) = engine.predict(content, top_k=1)
        assert rows[file] == {
            "name": file,
            "class": name,
            "probability": probability,
            "error": None,
        }
    assert "cannot be read as an image" in rows[files[-1]]["error"]
    assert rows[files[-1]]["class"] is None
