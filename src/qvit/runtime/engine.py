"""The engine: a packed file that runs in integer arithmetic. NumPy, Pillow and the kernels; never PyTorch."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvit import _kernels
from qvit.errors import ConfigError, DataError
from qvit.format.branches import Attention, Mlp, Residual
from qvit.format.ops import OPERANDS, Classify, Embed, Norm, Pool, Tokens
from qvit.format.packed import PackedModel, Source, read_packed
from qvit.images import mode_of, open_image
from qvit.runtime.parts import Part, program_parts
from qvit.runtime.preprocess import preprocess_batch

_TRACED = 8
"""Images whose codes the kernels keep at once."""
Picture = str | Path | Image.Image


def load(source: Source, *, threads: int | None = None, instruction_set: str | None = None) -> Engine:
    """Return an engine that runs a packed file.

    Args:
        source: what ``qvit export`` wrote: a path, its bytes, or a binary file that is open for reading.
        threads: of the engine's own pool; all of the processor's by default.
        instruction_set: one of :func:`instruction_sets`, the best one by default.

    Raises:
        PackedFileError: naming the file, the entry and what is wrong with it.
        ConfigError: for a number of threads below 1 or an instruction set that this machine does not have.
    """
    return Engine(read_packed(source), threads=threads, instruction_set=instruction_set)


def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine can run, best first; the last is always ``portable``."""
    return _kernels.instruction_sets()


class Engine:
    """A quantized vision transformer on codes.

    Call it on preprocessed images for logits, or :meth:`predict` on image files. It may be used from several threads
    at once: their calls take turns, each with all of the engine's threads.

    Args:
        packed: what :func:`qvit.format.packed.read_packed` returned; its tensors are taken out as the kernels take
            them in.
        threads: see :func:`load`.
        instruction_set: see :func:`load`.

    Raises:
        ConfigError: see :func:`load`.
    """

    def __init__(self, packed: PackedModel, *, threads: int | None = None, instruction_set: str | None = None) -> None:
        self.program, self.classes, self.preprocessing = packed.program, packed.classes, packed.preprocessing
        self.threads = processors() if threads is None else threads
        if not isinstance(self.threads, int) or self.threads < 1:
            raise ConfigError(f"threads must be a whole number from 1 up, not {threads!r}.")
        known = instruction_sets()
        self.instruction_set = known[0] if instruction_set is None else instruction_set
        if self.instruction_set not in known:
            raise ConfigError(f"This machine has no instruction set {instruction_set!r}, it has {', '.join(known)}.")
        self._model = _build(packed, self.instruction_set, self.threads)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits ``(B, classes)`` of preprocessed images ``(B, C, H, W)``, both float32.

        Of a feature extractor the pooled vectors, ``(B, width)``.

        Raises:
            DataError: for images of another shape, or with a NaN or an infinity.
        """
        images = self._checked(images)
        logits = np.empty((len(images), self.program.output), np.float32)
        self._model.forward(images, logits)
        return logits

    def predict(self, images: Picture | Sequence[Picture], top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the ``top_k`` classes of each image with their probabilities, the most probable first.

        Args:
            images: paths or Pillow images, or one of them.
            top_k: at most this many classes an image.

        Raises:
            CorruptImageError: naming the first image that cannot be read.
        """
        pictures = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        if not pictures:
            return []
        mode = mode_of(self.program.input[0])
        opened = [image if isinstance(image, Image.Image) else open_image(image, mode) for image in pictures]
        logits = self(preprocess_batch(opened, self.preprocessing)).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)
        ranked = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
        return [[(self.classes[c], float(row[c])) for c in best] for best, row in zip(ranked, shares, strict=True)]

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
        attentions = self.program.attentions()
        found: dict[str, NDArray[np.uint8]] = {}
        chunks = [self._model.trace(images[at : at + _TRACED]) for at in range(0, len(images), _TRACED)]
        for key, (_, (_, rows, width)) in chunks[0].items():
            values = b"".join(chunk[key][0] for chunk in chunks)
            codes: NDArray[np.uint8] = np.frombuffer(values, np.uint8).reshape(len(images), rows, width)
            name, (owner, _, part) = self._names[key], self._names[key].rpartition(".")
            if owner in attentions and part != "qkv":
                attention, x = attentions[owner]
                codes = codes.reshape(len(images), attention.heads, x.tokens, width)
                if part == "proj":
                    codes = codes.transpose(0, 2, 1, 3).reshape(len(images), x.tokens, attention.width)
            elif key[0] == "head":
                codes = codes[:, 0]
            found[name] = codes
        return found

    def profile(self, images: NDArray[np.float32], repeats: int = 10) -> dict[str, float]:
        """Return the seconds of each kind of work in a call on ``images``, summed over threads, mean over ``repeats``.

        Reading the clock between them costs some percent.
        """
        self(images)
        self._model.profile()
        self._model.set_timed(True)
        try:
            for _ in range(repeats):
                self(images)
        finally:
            self._model.set_timed(False)
        return {name: seconds / repeats for name, seconds in self._model.profile()}

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        expected = self.program.input
        if images.ndim != 4 or images.shape[1:] != expected:
            raise DataError(
                f"{self.program.name} takes images of shape (B, {', '.join(map(str, expected))}), not {images.shape}."
            )
        images = np.ascontiguousarray(images, np.float32)
        # The sum is finite unless a value is not (or the values are of no image): the quick check first.
        if not np.isfinite(images.sum()) and not np.isfinite(images).all():
            raise DataError("The images hold a NaN or an infinity.")
        return images

    @functools.cached_property
    def _names(self) -> dict[tuple[str, int, int], str]:
        """The file's name of each quantizer by the kernels' own: part, block and branch."""
        names = {}
        block = -1
        for operation in self.program.operations:
            if isinstance(operation, Embed):
                names["patch", 0, 0] = operation.layer.name
            elif isinstance(operation, Classify):
                names |= {("head", 0, index): layer.name for index, layer in enumerate(operation.heads)}
            elif isinstance(operation, Residual):
                block += isinstance(operation.branches[0], Attention)
                for index, branch in enumerate(operation.branches):
                    if isinstance(branch, Attention):
                        names |= {("qkv", block, index): branch.qkv.name, ("proj", block, index): branch.proj.name}
                        for operand, part in zip(OPERANDS, ("query", "key", "value", "attention"), strict=True):
                            names[part, block, index] = f"{branch.name}.{operand}"
                    else:
                        layers = (("up", branch.fc1), ("gate", branch.gate), ("down", branch.fc2))
                        names |= {(part, block, index): layer.name for part, layer in layers if layer is not None}
        return names


def processors() -> int:
    """Return how many processors this process may use: a container or taskset may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(packed: PackedModel, instruction_set: str, threads: int) -> _kernels.Model:
    program, shapes = packed.program, packed.program.streams
    kinds = [type(operation) for operation in program.operations]
    attentions = [branch for op in program.operations if isinstance(op, Residual) for branch in op.branches]
    plain = all(
        isinstance(b, Mlp) or (b.window, b.bias, b.rotary, b.scale is None) == (None,) * 3 + (False,)
        for b in attentions
    )
    known = {Embed, Tokens, Norm, Residual, Pool, Classify}
    if not plain or not set(kinds) <= known or kinds[-1] is not Classify or Tokens not in kinds:
        raise ConfigError(f"The engine cannot run {program.name} yet.")
    parts = program_parts(program, packed.tensors)
    by_kind = {kind: index for index, kind in enumerate(kinds)}
    first, last = kinds.index(Residual), len(kinds) - 1 - kinds[::-1].index(Residual)
    tokens, pool = kinds.index(Tokens), kinds.index(Pool)

    def norm_in(low: int, high: int) -> Part | None:
        return next((parts[i]["norm"] for i in range(low, high) if kinds[i] is Norm), None)

    attention = next(b for b in attentions if isinstance(b, Attention))
    patch = program.operations[0].patch  # type: ignore[attr-defined]
    shape = {
        "channels": program.input[0],
        "height": program.input[1],
        "width": program.input[2],
        "patch_height": patch[0],
        "patch_width": patch[1],
        "embed_dim": shapes[1].width,
        "heads": attention.heads,
        "head_dim": attention.head_dim,
        "prefix": shapes[first].prefix,
        "skip": parts[pool]["skip"],
        "classes": program.output,
        "attention_scale": attention.scale,
        "pool": parts[pool]["kind"],
    }
    model = _kernels.Model(instruction_set, shape, threads)
    model.set_embedding(
        {
            "patch": parts[0]["layer"],
            "norm": norm_in(1, tokens),
            "prefix": parts[tokens]["prefix"],
            "positions": parts[tokens]["position"],
            "pre_norm": norm_in(tokens, first),
        }
    )
    for index in range(first, last + 1, 2):
        model.add_block(
            {
                "post": parts[index]["post"],
                "attentions": [
                    {**b, "attention": b["map"], "inner": b["inner_norm"]} for b in parts[index]["branches"]
                ],
                "mlps": [_mlp_part(b) for b in parts[index + 1]["branches"]],
            }
        )
    model.set_head(
        {
            "norm": norm_in(last, pool),
            "pool_norm": norm_in(pool, len(kinds)),
            "heads": parts[by_kind[Classify]]["heads"],
        }
    )
    return model


def _mlp_part(part: Part) -> Part:
    kinds = {"plain": "plain", "swiglu": "split", "glu": "first_half", "glu_gate_last": "last_half"}
    return {
        "norm": part["norm"],
        "hidden": part["fc2"]["inputs"],
        "kind": kinds[part["kind"]],
        "activation": part["activation"],
        "inner": part["inner_norm"],
        "down": part["fc2"],
        "gate": part["gate"],
        "up": part["fc1"],
    }
