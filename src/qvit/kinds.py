"""What a file or a folder is, told by its content, for a reader that was given another one. No PyTorch here."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

Name = Literal["folder", "packed", "checkpoint", "weights", "other"]
_START = 2**16
"""Bytes that are looked at."""
_HEADER = 2**22
"""Bytes of the header of a safetensors file that are looked at."""
_FORMAT = b"qvit-checkpoint"
_SUFFIX = ".safetensors"
"""By which the commands that take packed models and checkpoints tell them from each other."""
_WEIGHTS = "a file of weights, of which qvit quantize makes a model of qvit's"
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself: run git lfs pull"),
    (b"\x89HDF", "an HDF5 file (Keras): give PyTorch's weights"),
    *((start, "a picture and no model") for start in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")),
)
_FOLDERS: tuple[tuple[str, str], ...] = (
    ("model.qvit", "a site of qvit web's: give the packed model that it was made of"),
    ("best.pt", "the folder of a run: give the best.pt in it"),
    ("last.pt", "the folder of a run: give the last.pt in it"),
    ("config.json", "a folder of weights, of which qvit quantize makes a model of qvit's"),
)
"""By what is in a folder, what it is."""


class Kind(NamedTuple):
    """What something is.

    Attributes:
        name: for who knows what to do with it.
        text: for everybody else, what it is and what to do, as the end of a sentence.
    """

    name: Name
    text: str


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """Return what is at ``path``; ``None`` for what is absent or cannot be told, as most of what is damaged cannot."""
    path = Path(path)
    try:
        if path.is_dir():
            known = (text for name, text in _FOLDERS if (path / name).exists())
            return Kind("folder", next(known, "a folder and no file"))
        return _kind_of_file(path) if path.is_file() else None
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile):
        return None


def _kind_of_file(path: Path) -> Kind | None:
    with open(path, "rb") as file:
        start = file.read(_START)
    if not start:
        return Kind("other", "empty")
    for beginning, text in _STARTS:
        if start.startswith(beginning):
            return Kind("other", text)
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return Kind("other", "a picture and no model")
    if start.startswith(b"PK"):
        return _kind_of_archive(path)
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x3a"):  # protobuf: a version, then the producer or the graph
        return Kind("other", "an ONNX file, which qvit writes and does not read: give the model that it was made of")
    return _kind_of_tensors(path) or _kind_of_text(start)


def _kind_of_archive(path: Path) -> Kind | None:
    with zipfile.ZipFile(path) as archive:
        entries = {name.rpartition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in entries or "constants.pkl" in entries:
            return None
        with archive.open(entries["data.pkl"]) as content:
            if _FORMAT not in content.read(_START):
                return Kind("weights", _WEIGHTS)
    way_out = "let its name end with .pt" if path.suffix == _SUFFIX else "qvit export makes a packed model of it"
    return Kind("checkpoint", f"a checkpoint of qvit's: {way_out}")


def _kind_of_tensors(path: Path) -> Kind | None:
    """Return which it is of the files that begin with the length of a JSON object and the object."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER, path.stat().st_size - 8):
            return None
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        return None
    if "parts" in header and "checksum" in header:
        return Kind("other", "a packed model as the browser takes it: give the one that it was made of")
    metadata = header.pop("__metadata__", {})
    if not header or not all(isinstance(entry, dict) and "data_offsets" in entry for entry in header.values()):
        return None
    if "qvit" not in metadata:
        return Kind("weights", _WEIGHTS)
    ends = path.suffix == _SUFFIX
    way_out = "give the checkpoint that it was made of" if ends else f"let its name end with {_SUFFIX}"
    return Kind("packed", f"a packed model: {way_out}")


def _kind_of_text(start: bytes) -> Kind | None:
    text = start.decode(errors="ignore" if len(start) == _START else "strict").strip()
    if len(start) < 8:  # less than the length that a packed model begins with, of one that was cut short maybe
        return None
    if not all(c.isprintable() or c.isspace() for c in text):
        return None
    if text.startswith("<"):
        return Kind("other", "a web page and no model: download the file itself")
    return Kind("other", "JSON and holds no weights" if text.startswith("{") else "a text and no model")
