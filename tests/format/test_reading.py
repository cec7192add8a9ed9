"""Whatever is given as a packed model is read, or refused in one sentence that fits on a screen."""

from __future__ import annotations

import array
import gzip
import io
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from packed_models import make_packed
from qvit.errors import PackedFileError
from qvit.format.packed import read_packed, write_packed
from qvit.runtime.engine import load

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "m.safetensors"
    write_packed(path, make_packed())
    return path


class OtherPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


class Reader:
    """Something with a ``read`` of its own."""

    def __init__(self, read: Callable[..., Any]) -> None:
        self.read = read


def started(path: Path) -> io.BytesIO:
    file = io.BytesIO(b"before it" + path.read_bytes())
    file.seek(len(b"before it"))
    return file


def closed(path: Path) -> Any:
    file = path.open("rb")
    file.close()
    return file


def cut_gzip(path: Path) -> Any:
    return gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(path.read_bytes())[:-200]))


def fails(*args: Any) -> bytes:
    raise RuntimeError("the peer\nhung up " + "x" * 5000)


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.seek(5)  # a map is a buffer, whole wherever it stands
    return mapping


def closed_map(path: Path) -> mmap.mmap:
    mapping = mapped(path)
    mapping.close()
    return mapping


def released(path: Path) -> memoryview:
    view = memoryview(path.read_bytes())
    view.release()
    return view


READ: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text of a path": str,
    "other path": OtherPath,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "memoryview of another item": lambda path: memoryview(path.read_bytes()[:0] + path.read_bytes()).cast("B"),
    "memoryview of every second byte": lambda path: memoryview(np.repeat(np.fromfile(path, np.uint8), 2))[::2],
    "array": lambda path: np.fromfile(path, np.uint8),
    "other array": lambda path: array.array("B", path.read_bytes()),
    "map": mapped,
    "bytes in memory": lambda path: io.BytesIO(path.read_bytes()),
    "from where it stands": started,
    "file": lambda path: path.open("rb"),
    "file without a buffer": lambda path: path.open("rb", buffering=0),
    "gzip": lambda path: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(path.read_bytes()))),
    "reader": lambda path: Reader(path.read_bytes),
}
KINDS = "must be a path, bytes or an open binary file, not "
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "None": (lambda path: None, KINDS + "NoneType"),
    "number": (lambda path: 5, KINDS + "int"),
    "list": (lambda path: [path], KINDS + "list"),
    "array of numbers": (lambda path: np.ones(9), "it is cut short, damaged or no safetensors file"),
    "array of dates": (lambda path: np.zeros(9, "datetime64[s]"), "cannot be read: "),
    "text": (lambda path: path.open(), "is open as text: open it with mode 'rb'"),
    "text of another code": (lambda path: path.open(encoding="latin-1"), "is open as text: open it with mode 'rb'"),
    "text in memory": (lambda path: io.StringIO("text"), "is open as text: open it with mode 'rb'"),
    "closed": (closed, "cannot be read: .*closed"),
    "closed map": (closed_map, "cannot be read: .*closed"),
    "memoryview that was released": (released, "cannot be read: .*released"),
    "open for writing": (lambda path: (path.parent / "other").open("wb"), "cannot be read: read"),
    "nothing ready": (lambda path: Reader(lambda: None), "its read() gives no bytes but NoneType"),
    "reader of text": (lambda path: Reader(lambda: "text"), "its read() gives no bytes but str"),
    "reader by size": (lambda path: Reader(lambda size: b""), "cannot be read: .*argument"),
    "reader that fails": (lambda path: Reader(fails), "cannot be read: the peer"),
    "class": (lambda path: io.BytesIO, "cannot be read: "),
    "gzip that is cut": (cut_gzip, "cannot be read: Compressed file ended"),
    "at its end": (lambda path: io.BytesIO(b""), "it is cut short"),
    "bytes of something else": (lambda path: b"\x89PNG" * 100_000, "it is cut short, damaged or no safetensors file"),
    "every second byte": (lambda path: memoryview(path.read_bytes())[::2], "damaged or no safetensors file"),
    "contents as a path": (lambda path: "[1, 2, 3]" * 40_000, "cannot be read"),
    "long path": (lambda path: str(path.parent / ("x" * 100_000)), "cannot be read"),
    "path of control characters": (lambda path: "\x1b[31m\n" * 500, "cannot be read|There is no file"),
    "path of half a letter": (lambda path: "\ud800", "cannot be read|There is no file"),
    "empty path": (lambda path: "", "There is no file"),
}


@pytest.fixture(scope="module")
def logits(path: Path) -> NDArray[np.float32]:
    return load(path, threads=1)(IMAGES)


@pytest.mark.parametrize("kind", READ)
def test_source_is_read(path: Path, logits: NDArray[np.float32], kind: str) -> None:
    source = READ[kind](path)
    engine = load(source, threads=1)
    np.testing.assert_array_equal(engine(IMAGES), logits)
    if hasattr(source, "close"):
        source.close()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(engine))(IMAGES), logits)


@pytest.mark.parametrize("kind", REFUSED)
def test_source_is_refused_in_a_sentence(path: Path, kind: str) -> None:
    make, match = REFUSED[kind]
    source = make(path)
    for read in (read_packed, load):
        with pytest.raises(PackedFileError, match=match.replace("()", r"\(\)")) as error:
            read(source)
        message = str(error.value)
        assert len(message) <= 1000
        assert message.isprintable()
        assert message.endswith(".")
    if hasattr(source, "close") and not isinstance(source, type):
        source.close()


def test_path_that_is_no_place_for_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = make_packed()
    model.classes = []
    with pytest.raises(PackedFileError, match="cannot be written: classes has 0 names") as error:
        write_packed(tmp_path / ("x" * 5000), model)
    assert len(str(error.value)) <= 1000
