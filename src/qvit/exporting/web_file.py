"""A packed model as the browser's engine takes it: its operations as the kernels take them (docs/web.md). No PyTorch.

The file is 8 bytes, the length of the JSON object that follows (little-endian), the object, padded with spaces, and the
arrays. In the object's ``parts`` (:mod:`qvit.runtime.parts`) an array is ``{"array": dtype, "start": byte, "shape":
[...]}``, its start counted from the first byte after the object.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvit.format.packed import PackedModel
from qvit.runtime.parts import program_parts

VERSION = 1
_ALIGNMENT = 64
_DTYPES = {np.dtype("<f4"): "F32", np.dtype(np.uint8): "U8"}


def web_file(packed: PackedModel) -> bytes:
    """Return the file that ``qvit.js`` loads.

    Args:
        packed: what :func:`qvit.format.packed.read_packed` returned.

    Raises:
        ConfigError: naming an operation that the kernels do not have.
    """
    arrays = _Arrays()
    parts = [arrays.placed(part) for part in program_parts(packed.program, dict(packed.tensors))]
    data = b"".join(arrays.bytes)
    description = {
        "version": VERSION,
        "checksum": f"{zlib.crc32(data):08x}",
        "name": packed.program.name,
        "input": list(packed.program.input),
        "outputs": packed.program.output,
        "preprocessing": packed.preprocessing,
        "classes": packed.classes,
        "parts": parts,
    }
    text = json.dumps(description, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + data


class _Arrays:
    """Arrays one after the other, those that several parts share once."""

    def __init__(self) -> None:
        self.bytes: list[bytes] = []
        self._length = 0
        self._places: dict[int, tuple[NDArray[Any], dict[str, Any]]] = {}  # with the arrays, so that ids stay theirs

    def placed(self, part: Any) -> Any:
        """Return a part as plain data, its arrays replaced by their places."""
        if isinstance(part, dict):
            return {name: self.placed(value) for name, value in part.items() if value is not None}
        if isinstance(part, (list, tuple)):
            return [self.placed(value) for value in part]
        if isinstance(part, np.ndarray):
            if id(part) not in self._places:
                self._places[id(part)] = part, self._place(part)
            return self._places[id(part)][1]
        return part

    def _place(self, array: NDArray[Any]) -> dict[str, Any]:
        data = array.tobytes()
        place = {"array": _DTYPES[array.dtype], "start": self._length, "shape": list(array.shape)}
        data += bytes(-len(data) % 4)  # of the next array's floats
        self.bytes.append(data)
        self._length += len(data)
        return place
