"""The packed file: a quantized vision transformer as codes at their true width, in one safetensors file.

The metadata entry ``qvit`` is the header (:mod:`qvit.format.header`), the tensors are those of
:meth:`qvit.format.program.Program.entries`. Data only: no pickle, no code, and nothing of it is used before all of it
is checked.

Weights: ``w_hat = scale * code`` with one scale per output channel; inputs: ``x_hat = input_scale * code +
input_offset`` (docs/method.md, section 1). LayerScale and a ``head`` rectifier are folded in, so that scales may have
either sign. A row of codes is a little-endian bit stream of ``code + 2^(b-1)``. No PyTorch here.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from qvit.config import Bits
from qvit.errors import PackedFileError
from qvit.files import BytesLike, first_line, has_buffer, write_atomically
from qvit.format.codes import unpack_codes
from qvit.format.fields import MAX_TEXT, shown
from qvit.format.header import VERSION, check_header, parse
from qvit.format.ops import Layer
from qvit.format.program import Program
from qvit.kinds import kind_of

MAX_HEADER = 2**22
"""Bytes of the longest header that is read; 20 000 class names and 100 blocks take less than half of it."""
_DTYPES: dict[str, np.dtype] = {"U8": np.dtype(np.uint8), "F32": np.dtype("<f4")}
_NO_CHECKSUM = "0" * 8
_UNNAMED = "The packed model"
"""What errors call one that has no path."""

Source = str | os.PathLike[str] | BytesLike | BinaryIO


class PackedLayer(NamedTuple):
    """A linear layer as the file holds it: ``x_hat = input_scale * code + input_offset``, ``w_hat = scale * code``.

    Attributes:
        bits: of the weights and of the inputs.
        inputs: length K of a row of weights.
        packed: packed weight codes ``(outputs, ceil(K * bits / 8))``, uint8.
        scale: ``(outputs,)``.
        bias: ``(outputs,)``.
        input_scale: step of the input codes, positive.
        input_offset: value of input code 0.
    """

    bits: Bits
    inputs: int
    packed: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    input_scale: np.float32
    input_offset: np.float32

    @property
    def codes(self) -> np.ndarray:
        """Signed weight codes ``(outputs, K)``, int8."""
        return unpack_codes(self.packed, self.bits.weight, self.inputs)


@dataclasses.dataclass
class PackedModel:
    """What a packed file holds.

    Args:
        program: what is computed.
        preprocessing: input_size (C, H, W), mean, std, crop_pct, crop_mode, interpolation.
        classes: class names in the order of the logits.
        origin: how the model was made, for people: plain JSON data.
        tensors: arrays by entry name, owned by the model: who needs the memory may take them out one by one.
        checksum: of the file that was read, as it states it; empty for a model that no file holds yet.
    """

    program: Program
    preprocessing: dict[str, Any]
    classes: list[str]
    origin: dict[str, Any]
    tensors: dict[str, np.ndarray]
    checksum: str = ""

    def layer(self, layer: Layer) -> PackedLayer:
        """Return what the file holds of a linear layer of the program."""
        packed, scale, bias, input_scale, input_offset = (
            self.tensors[f"{layer.name}.{part}"] for part in ("codes", "scale", "bias", "input_scale", "input_offset")
        )
        return PackedLayer(layer.bits, layer.inputs, packed, scale, bias, input_scale[0], input_offset[0])


def write_packed(path: str | Path, model: PackedModel) -> None:
    """Write a packed file; what was at ``path`` is replaced only once the new file is complete on disk.

    Raises:
        PackedFileError: naming the entry, for a model that :func:`read_packed` would refuse.
        OutputError: if the file cannot be written.
    """
    import safetensors.numpy

    expected: dict[str, Any] = {}
    try:
        text = _header(model)
        program = check_header(parse(text, "the header"))
        expected = program.entries()
        _same_names(expected, model.tensors)
        tails, positive = _tails(program), _positive(program)
        checksum = zlib.crc32(text.encode())
        for name, (dtype, shape) in expected.items():
            array = model.tensors[name]
            if (array.dtype, array.shape) != (dtype, shape):
                raise PackedFileError(f"{name} is {array.dtype} {array.shape}, it must be {dtype} {shape}.")
            _check_values(name, array, tails.get(name, 0), name in positive)
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    except (PackedFileError, TypeError, ValueError, UnicodeError) as error:
        raise PackedFileError(f"{_called(path)} cannot be written: {first_line(error)}") from error
    text = text.replace(f'"checksum":"{_NO_CHECKSUM}"', f'"checksum":"{checksum:08x}"', 1)
    tensors = {name: np.ascontiguousarray(model.tensors[name]) for name in expected}
    data = safetensors.numpy.save(tensors, {"qvit": text})
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))


def packed_size(model: PackedModel) -> int:
    """Return the bytes of the file that :func:`write_packed` would write; ``model.tensors`` are not looked at."""
    import safetensors.numpy

    tensors = {name: np.zeros(shape, dtype) for name, (dtype, shape) in model.program.entries().items()}
    return len(safetensors.numpy.save(tensors, {"qvit": _header(model)}))


def _header(model: PackedModel) -> str:
    """Return the header's text, with zeros in place of the checksum.

    Raises:
        TypeError: or ValueError, for what is no plain data.
    """
    header = {
        "version": VERSION,
        "checksum": _NO_CHECKSUM,
        "name": model.program.name,
        "input": list(model.program.input),
        "program": model.program.to_list(),
        "preprocessing": model.preprocessing,
        "classes": model.classes,
        "origin": model.origin,
    }
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read_packed(source: Source) -> PackedModel:
    """Read and check a packed file. Holds no more than the tensors themselves in memory.

    Args:
        source: a path, the file's bytes in any buffer, or a binary file that is open for reading, from where it stands
            to its end.

    Raises:
        PackedFileError: naming the file, the entry and what is wrong with it.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_path(source)
    data = content_of(source)
    try:
        return _read(io.BytesIO(data), len(data))
    except PackedFileError as error:
        raise PackedFileError(f"{_UNNAMED}: {error}") from error


def content_of(source: BytesLike | BinaryIO) -> bytes:
    """Return the bytes of a buffer, or of a binary file that is open for reading, from where it stands to its end.

    Raises:
        PackedFileError: if it is neither, or cannot be read.
    """
    buffer = has_buffer(source)
    if not buffer and not callable(getattr(source, "read", None)):
        kind = type(source).__name__
        raise PackedFileError(f"{_UNNAMED} must be a path, bytes or an open binary file, not {kind}.")
    if isinstance(source, io.TextIOBase):
        raise PackedFileError(f"{_UNNAMED} is open as text: open it with mode 'rb'.")
    try:
        data: object = source if buffer else source.read()  # type: ignore[union-attr]
        if not has_buffer(data):
            raise ValueError(f"its read() gives no bytes but {type(data).__name__}.")
        return bytes(data)
    except Exception as error:  # whatever the file may be
        raise PackedFileError(f"{_UNNAMED} cannot be read: {first_line(error)}") from error


def _read_path(path: str | os.PathLike[str]) -> PackedModel:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PackedFileError("it is no file.")
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except PackedFileError as error:
        kind = kind_of(path)
        if kind is not None and kind.name != "packed":
            raise PackedFileError(f"{_called(path)} is {kind.text}.") from error
        raise PackedFileError(f"{_called(path)}: {error}") from error
    except FileNotFoundError as error:
        raise PackedFileError(f"There is no file {_called(path)}.") from error
    except (OSError, ValueError) as error:  # a ValueError for a path that no file system can hold
        raise PackedFileError(f"{_called(path)} cannot be read: {first_line(error)}") from error


def _called(path: str | os.PathLike[str]) -> str:
    """Return a path for an error message: printable, and cut at its start to a readable length."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= MAX_TEXT else f"...{text[-MAX_TEXT:]}"


class _Stored(NamedTuple):
    dtype: str
    shape: list[int]
    start: int
    end: int


# safetensors' own reader maps the file and then copies every tensor, which takes the memory twice, and its errors name
# no entry. So it is read here, by the format's definition: the length of a JSON object (8 bytes, little-endian), the
# object (name to dtype, shape and data_offsets) padded with spaces, then the tensors without a gap.
def _read(file: BinaryIO, size: int) -> PackedModel:
    if size < 8:
        raise PackedFileError(f"it is cut short: {size} bytes do not hold a safetensors header.")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise PackedFileError(
            f"its header should take {length} bytes; the file has {size}, and a header at most {MAX_HEADER}: it is cut "
            "short, damaged or no safetensors file."
        )
    text, stored = _read_index(file.read(length))
    header = parse(text, "the header")
    program = check_header(header)
    _check_layout(stored, size - 8 - length)

    # First every entry, then the first byte of data.
    expected = {}
    for name, (dtype, shape) in program.entries().items():
        if name not in stored:
            raise PackedFileError(f"{name} is absent.")
        entry = stored[name]
        if (_DTYPES[entry.dtype], tuple(entry.shape)) != (dtype, shape):
            is_now = f"{entry.dtype} {shown(entry.shape)}"
            raise PackedFileError(f"{name} is {is_now}, the program needs {dtype} {list(shape)}.")
        expected[name] = dtype, shape
    _same_names(expected, stored)

    zeroed = text.replace(f'"checksum":"{header["checksum"]}"', f'"checksum":"{_NO_CHECKSUM}"', 1)
    checksum = zlib.crc32(zeroed.encode())
    tails, positive = _tails(program), _positive(program)
    tensors = {}
    for name, (dtype, shape) in expected.items():
        array = np.empty(shape, dtype)
        file.seek(8 + length + stored[name].start)
        if file.readinto(array.data.cast("B")) != array.nbytes:  # type: ignore[attr-defined]
            raise PackedFileError(f"{name} is cut short: the file changed while it was read.")
        _check_values(name, array, tails.get(name, 0), name in positive)
        checksum = zlib.crc32(array.data, checksum)
        tensors[name] = array
    if f"{checksum:08x}" != header["checksum"]:
        raise PackedFileError(
            f"checksum is {header['checksum']}, the content gives {checksum:08x}: the file was damaged or edited."
        )
    preprocessing, classes, origin = header["preprocessing"], header["classes"], header["origin"]
    return PackedModel(program, preprocessing, classes, origin, tensors, header["checksum"])


def _read_index(raw: bytes) -> tuple[str, dict[str, _Stored]]:
    """Return qvit's own header text and where each tensor lies."""
    try:
        decoded = raw.rstrip(b" ").decode()
    except UnicodeDecodeError:
        raise PackedFileError("its header is no text: it is damaged or no safetensors file.") from None
    if not decoded.startswith("{") or not decoded.endswith("}"):
        raise PackedFileError("its header is no JSON object: it is damaged or no safetensors file.")
    index = parse(decoded, "the safetensors header")
    metadata = index.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("qvit"), str):
        raise PackedFileError("it is no packed model of qvit's: its metadata has no entry 'qvit'.")
    if len(metadata) != 1:
        raise PackedFileError(f"its metadata has an unknown entry {shown(max(set(metadata) - {'qvit'}))}.")
    return metadata["qvit"], {name: _stored(name, entry) for name, entry in index.items()}


def _stored(name: str, entry: Any) -> _Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise PackedFileError(f"{shown(name)} must have a dtype, a shape and data_offsets, it is {shown(entry)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise PackedFileError(f"{shown(name)} has dtype {shown(dtype)}, a packed file holds {' and '.join(_DTYPES)}.")
    if not _are_sizes(shape):
        raise PackedFileError(f"{shown(name)} has shape {shown(shape)}, which is none.")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise PackedFileError(f"{shown(name)} has data_offsets {shown(offsets)}, which are none.")
    return _Stored(dtype, shape, *offsets)


def _are_sizes(value: Any) -> bool:
    # 2^48: beyond any file, and small enough that no product of four is slow or printed at length.
    return (
        isinstance(value, list)
        and len(value) <= 4
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in value)
    )


def _check_layout(stored: Mapping[str, _Stored], size: int) -> None:
    """Refuse tensors that overlap, leave gaps, are of another size than their shape, or end elsewhere than the file."""
    at = 0
    for name, entry in sorted(stored.items(), key=lambda item: (item[1].start, item[1].end)):
        needed = _DTYPES[entry.dtype].itemsize
        for side in entry.shape:
            needed *= side
        if entry.end - entry.start != needed:
            raise PackedFileError(
                f"{shown(name)} takes the bytes {entry.start} to {entry.end}, its shape {entry.shape} needs {needed}."
            )
        if entry.start != at:
            raise PackedFileError(f"{shown(name)} starts at byte {entry.start} of the data, not at {at}.")
        at = entry.end
        if at > size:
            raise PackedFileError(f"{shown(name)} is cut short: it ends at byte {at} of the data, the file at {size}.")
    if at != size:
        raise PackedFileError(f"the file goes on for {size - at} bytes after its last entry.")


def _tails(program: Program) -> dict[str, int]:
    """Return how many bits of the last byte of a row of codes are used, by entry; 0 for all of them."""
    return {f"{name}.codes": layer.inputs * layer.bits.weight % 8 for name, layer in program.layers().items()}


def _positive(program: Program) -> set[str]:
    """Return the entries that must be positive: scales of activations. Those of weights may have either sign."""
    operands = (name for operation in program.operations for name, _ in operation.operands())
    return {f"{name}.scale" for name in operands} | {f"{name}.input_scale" for name in program.layers()}


def _check_values(name: str, array: np.ndarray, tail: int, positive: bool) -> None:
    if array.dtype == np.uint8:
        if tail and (array[:, -1] >> tail).any():
            raise PackedFileError(f"{name} has bits set after the last code of a row.")
        return
    if not np.isfinite(array).all():
        raise PackedFileError(f"{name} holds a NaN or an infinity.")
    if positive and not (array > 0).all():
        raise PackedFileError(f"{name} must be positive.")
    if name.endswith("_rectifier.gamma") and not array.all():
        raise PackedFileError(f"{name} holds a 0, and is divided by.")


def _same_names(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in expected:
        if name not in found:
            raise PackedFileError(f"{name} is absent.")
    for name in found:
        if name not in expected:
            raise PackedFileError(f"{shown(name)} is no entry of this program.")
