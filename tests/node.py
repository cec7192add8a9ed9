"""The engine of the browser, run by Node: what ``qvit web`` writes, loaded and called from Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qvit.exporting.web_file import web_file
from qvit.exporting.web_site import MODULES
from qvit.format.packed import PackedModel
from qvit.runtime.trace import traced

WEB = Path(str(resources.files("qvit") / "web"))


class NodeError(Exception):
    """What JavaScript threw: the name of its kind and its message."""


class Node:
    """A process of Node that keeps running; files go through ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = ["node", "--no-warnings", str(Path(__file__).with_name("node.mjs")), str(WEB)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, name: str, **values: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": name, **values}, default=str) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise NodeError(answer["kind"], answer["error"])
        return answer["result"]

    def put(self, name: str, data: bytes | NDArray[Any]) -> Path:
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.tobytes())
        return path

    def close(self) -> None:
        self._process.communicate()


class NodeEngine:
    """A packed model in Node, as an :class:`qvit.runtime.engine.Engine` for :func:`following.check_codes`."""

    def __init__(
        self, node: Node, packed: PackedModel, *, threads: int = 1, slow: bool = False, high: bool = False
    ) -> None:
        self._node, self._program = node, packed.program
        self._how = {"threads": threads, "slow": slow, "high": high}
        self._file = node.put("model.qvit", web_file(packed))
        self.instruction_set = "portable" if slow else "simd128"

    def _run(self, images: NDArray[np.float32], **values: Any) -> Any:
        given = self._node.put("images", np.ascontiguousarray(images, np.float32))
        out = self._node.folder / "out"
        return self._node.call("run", file=self._file, images=given, out=out, **self._how, **values)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self._run(images)
        return np.fromfile(self._node.folder / "out", np.float32).reshape(len(images), self._program.output)

    def codes(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.uint8]]:
        path = self._node.folder / "codes"
        found = self._run(images, codes=path)
        data, codes, start = np.fromfile(path, np.uint8), {}, 0
        for key, rows, width in found:
            end = start + len(images) * rows * width
            name, shaped = traced(self._program, tuple(key), data[start:end].reshape(len(images), rows, width))
            codes[name], start = shaped, end
        assert start == len(data)
        return codes


def are_modules_built() -> bool:
    """Say whether the engine of the browser is built."""
    return all((WEB / module).exists() for module in MODULES)


def need_modules() -> None:
    """Skip a test where the engine of the browser is not built, or there is no Node to run it."""
    if not are_modules_built():
        pytest.skip("the engine of the browser is not built: make web")
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js on the path")
