"""The engine: a packed file that runs in integer arithmetic. NumPy, Pillow and the kernels; never PyTorch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from qvit import _kernels
from qvit.config import check_count
from qvit.errors import ConfigError, DataError, PackedFileError
from qvit.files import cut
from qvit.format.fields import shown
from qvit.format.packed import PackedModel, Source, content_of, read_packed
from qvit.images import ImageSource, is_one
from qvit.runtime.parts import program_parts
from qvit.runtime.preprocess import preprocess_batch
from qvit.runtime.processors import MOST_THREADS, processors
from qvit.runtime.trace import traced

_TRACED = 8
"""Images whose codes the kernels keep at once."""
T = TypeVar("T")


def load(source: Source, *, threads: int | None = None, instruction_set: str | None = None) -> Engine:
    """Return an engine that runs a packed file.

    The engine can be pickled: then the path goes along, or else the bytes, which the engine keeps for that.

    Args:
        source: what ``qvit export`` wrote: a path, its bytes in any buffer, or a binary file that is open for reading.
        threads: of the engine's own pool; by default as many as this process may use, its container's share included.
        instruction_set: one of :func:`instruction_sets`, the best one by default.

    Raises:
        PackedFileError: naming the file, the entry and what is wrong with it.
        ConfigError: for a number of threads below 1 or above 1024, or an instruction set that this machine does not
            have.
    """
    given = source if isinstance(source, (str, os.PathLike)) else content_of(source)
    packed = read_packed(given)
    engine = Engine.__new__(Engine)
    engine._build(packed, threads, instruction_set)
    kept = given if isinstance(given, bytes) else os.path.abspath(given)
    engine._loaded = _Loaded(kept, packed.checksum, threads, instruction_set)
    return engine


def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine can run, best first; the last is always ``portable``."""
    return _kernels.instruction_sets()


class _Loaded(NamedTuple):
    """What :func:`load` was given, for an engine of another process; and the checksum of what it found."""

    source: str | bytes
    checksum: str
    threads: int | None
    instruction_set: str | None


def _load_again(source: str | bytes, checksum: str, threads: int | None, instruction_set: str | None) -> Engine:
    engine = load(source, threads=threads, instruction_set=instruction_set)
    if engine._loaded != _Loaded(source, checksum, threads, instruction_set):  # a path may hold another file by now
        raise PackedFileError(
            f"{cut(str(source))} holds another model than when the engine was pickled: put that one back."
        )
    return engine


def _plain(number: Any) -> Any:
    """Return a whole number of NumPy's as Python's."""
    return number.item() if isinstance(number, np.integer) else number


class Engine:
    """A quantized vision transformer on codes.

    Call it on preprocessed images for logits, or :meth:`predict` on image files. It may be used from several threads
    at once: their calls take turns, each with all of the engine's threads. The child of a fork may use it too, and has
    threads of its own; the weights are shared until the parent or the child ends.

    Args:
        packed: what :func:`qvit.format.packed.read_packed` returned.
        threads: see :func:`load`.
        instruction_set: see :func:`load`.

    Raises:
        ConfigError: see :func:`load`.
    """

    _loaded: _Loaded | None = None

    def __init__(self, packed: PackedModel, *, threads: int | None = None, instruction_set: str | None = None) -> None:
        self._build(dataclasses.replace(packed, tensors=dict(packed.tensors)), threads, instruction_set)

    def __repr__(self) -> str:
        kind = f"{len(self.classes)} classes" if self.program.classifies else f"vectors of {self.program.output}"
        size = " x ".join(map(str, self.program.input))
        return (
            f"<qvit.Engine of {shown(self.program.name)}: {size}, {kind}, threads={self.threads}, "
            f"instruction_set={self.instruction_set!r}>"
        )

    def __reduce__(self) -> tuple[Callable[..., Engine], _Loaded]:
        if self._loaded is None:
            raise ConfigError("An engine of a model in memory cannot be pickled: write the model and load the file.")
        return _load_again, self._loaded

    def _build(self, packed: PackedModel, threads: int | None, instruction_set: str | None) -> None:
        """Take the tensors out of ``packed`` one by one: where it is nobody else's, their memory is free at once."""
        self.program, self.classes, self.preprocessing = packed.program, packed.classes, packed.preprocessing
        if threads is not None:
            threads = _plain(threads)
            check_count("threads", threads, most=MOST_THREADS)
        self.threads = min(processors(), MOST_THREADS) if threads is None else threads
        known = instruction_sets()
        self.instruction_set = known[0] if instruction_set is None else instruction_set
        if self.instruction_set not in known:
            raise ConfigError(f"This machine has no instruction set {instruction_set!r}, it has {', '.join(known)}.")
        self._model = _kernels.Model(self.instruction_set, *self.program.input, self.threads)
        try:
            for part in program_parts(self.program, packed.tensors):
                self._model.add(part)
        except ValueError as error:
            raise ConfigError(f"The engine cannot run {self.program.name}: {error}.") from error

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits ``(B, classes)`` of preprocessed images ``(B, C, H, W)``, both float32.

        Of a feature extractor the pooled vectors, ``(B, width)``.

        Raises:
            DataError: for images of another shape, of whole numbers, or with a NaN or an infinity.
        """
        images = self._checked(images)
        logits = np.empty((len(images), self.program.output), np.float32)
        self._run(self._model.forward, images, logits)
        return logits

    def predict(self, images: ImageSource | Sequence[ImageSource], top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the ``top_k`` classes of each image with their probabilities, the most probable first.

        Args:
            images: one image or several: paths, bytes of files in any buffer, files open in binary mode, uint8 arrays
                ``(H, W, C)`` or Pillow images; see :func:`qvit.images.open_picture`.
            top_k: at most this many classes an image, from 1 up.

        Raises:
            ConfigError: for a feature extractor, which has no classes, or for another ``top_k``.
            CorruptImageError: naming the first image that cannot be read.
        """
        if not self.program.classifies:
            raise ConfigError(
                f"{self.program.name} is a feature extractor and has no classes: engine.embed(images) gives its "
                "vectors."
            )
        return self.most_probable(self._of_pictures(images), top_k)

    def most_probable(self, logits: NDArray[np.float32], top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the ``top_k`` classes of each row of ``logits`` ``(B, classes)`` as :meth:`predict` does.

        Raises:
            ConfigError: for another ``top_k``.
            DataError: for logits of another shape, or with a NaN or an infinity.
        """
        check_count("top_k", _plain(top_k))
        scaled = np.asarray(logits, np.float64)
        if scaled.shape[1:] != (len(self.classes),):
            raise DataError(f"{self.program.name} has logits (B, {len(self.classes)}), not {scaled.shape}.")
        if not np.isfinite(scaled).all():
            raise DataError("The logits hold a NaN or an infinity.")
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [(self.classes[c], float(row[c])) for c in best] for best, row in zip(ranked, probabilities, strict=True)
        ]

    def embed(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """Return the pooled vector of each image, ``(B, width)``, float32, of a feature extractor.

        Args:
            images: as in :meth:`predict`.

        Raises:
            ConfigError: for a classifier, whose vectors are not what comes out.
            CorruptImageError: naming the first image that cannot be read.
        """
        if self.program.classifies:
            raise ConfigError(f"{self.program.name} is a classifier: export a model without its head to embed images.")
        return self._of_pictures(images)

    def _of_pictures(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        single = is_one(images) or not isinstance(images, Iterable)
        sources: list[ImageSource] = [images] if single else list(images)  # type: ignore[arg-type, list-item]
        return self(preprocess_batch(sources, self.preprocessing))

    def codes(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.uint8]]:
        """Return the codes of every activation quantizer, unsigned (signed ones plus ``2^(b-1)``), by name.

        Names and shapes are those that :class:`qvit.runtime.reference.ReferenceEngine` shows its ``watch``:
        ``(B, N, K)`` before a linear layer (``(B, K)`` before a classifier), ``(B, H, N, D)`` of queries, keys and
        values, ``(B, H, N, N)`` of the attention map.

        Args:
            images: as in a call.

        Raises:
            DataError: as in a call.
        """
        images = self._checked(images)
        if not len(images):  # names and shapes are those of one image
            return {name: codes[:0] for name, codes in self.codes(np.zeros((1, *images.shape[1:]), np.float32)).items()}
        found: dict[str, NDArray[np.uint8]] = {}
        chunks = [self._run(self._model.trace, images[at : at + _TRACED]) for at in range(0, len(images), _TRACED)]
        for key, (_, (_, rows, width)) in chunks[0].items():
            values = b"".join(chunk[key][0] for chunk in chunks)
            codes: NDArray[np.uint8] = np.frombuffer(values, np.uint8).reshape(len(images), rows, width)
            name, shaped = traced(self.program, key, codes)
            found[name] = shaped
        return found

    def profile(self, images: NDArray[np.float32], repeats: int = 10) -> dict[str, float]:
        """Return the seconds of each kind of work in a call on ``images``, summed over threads, mean over ``repeats``.

        Reading the clock between them costs some percent.

        Raises:
            ConfigError: for ``repeats`` below 1.
            DataError: as in a call.
        """
        check_count("repeats", _plain(repeats))
        self(images)
        self._model.profile()
        self._model.set_timed(True)
        try:
            for _ in range(repeats):
                self(images)
        finally:
            self._model.set_timed(False)
        return {name: seconds / repeats for name, seconds in self._model.profile()}

    def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return function(*arguments)
        except _kernels.ThreadError as error:
            raise ConfigError(
                f"The engine cannot start {self.threads} threads ({error}): load it with fewer threads."
            ) from error

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        expected = self.program.input
        try:
            images = np.asarray(images)
        except (TypeError, ValueError, RuntimeError) as error:  # of a tensor on a GPU, with a gradient
            raise DataError(f"{self.program.name} takes images in an array: {error}") from error
        if images.dtype.kind != "f":
            raise DataError(
                f"{self.program.name} takes images that are preprocessed, of type float32, not {images.dtype}: predict "
                "and embed take pictures as they are."
            )
        if images.shape[1:] != expected:
            raise DataError(
                f"{self.program.name} takes images of shape (B, {', '.join(map(str, expected))}), not {images.shape}."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            images = np.ascontiguousarray(images, np.float32)
            # The sum is finite unless a value is not (or the values are of no image): the quick check first.
            finite = bool(np.isfinite(images.sum())) or bool(np.isfinite(images).all())
        if not finite:
            raise DataError("The images hold a NaN or an infinity.")
        return images
