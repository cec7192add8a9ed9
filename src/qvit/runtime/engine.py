"""The engine: a packed file that runs in integer arithmetic. NumPy, Pillow and the kernels; never PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvit import _kernels
from qvit.errors import ConfigError, DataError
from qvit.format.architecture import Architecture, Branch, Norm
from qvit.format.packed import PackedModel, read_packed
from qvit.images import mode_of, open_image
from qvit.runtime.preprocess import preprocess_batch

RECTIFIER_EPS = 1e-6
"""Under the root of a token rectifier's variance (method.md, section 2)."""
_TRACED = 8
"""Images whose codes the kernels keep at once."""
Picture = str | Path | Image.Image


def load(path: str | Path, *, threads: int | None = None, instruction_set: str | None = None) -> Engine:
    """Return an engine that runs the packed file at ``path``.

    Args:
        path: what ``qvit export`` wrote.
        threads: of the engine's own pool; all of the processor's by default.
        instruction_set: one of :func:`instruction_sets`, the best one by default.

    Raises:
        PackedFileError: naming the file, the entry and what is wrong with it.
        ConfigError: for a number of threads below 1 or an instruction set that this machine does not have.
    """
    return Engine(read_packed(path), threads=threads, instruction_set=instruction_set)


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
        self.architecture: Architecture = packed.architecture
        self.bits, self.classes, self.preprocessing = packed.bits, packed.classes, packed.preprocessing
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

        Raises:
            DataError: for images of another shape, or with a NaN or an infinity.
        """
        images = self._checked(images)
        logits = np.empty((len(images), self.architecture.class_count), np.float32)
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
        mode = mode_of(self.architecture.channels)
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
        net = self.architecture
        found: dict[str, NDArray[np.uint8]] = {}
        chunks = [self._model.trace(images[at : at + _TRACED]) for at in range(0, len(images), _TRACED)]
        for key, (_, (_, rows, width)) in chunks[0].items():
            values = b"".join(chunk[key][0] for chunk in chunks)
            codes: NDArray[np.uint8] = np.frombuffer(values, np.uint8).reshape(len(images), rows, width)
            part, block, branch = key
            if part in ("query", "key", "value", "attention"):
                codes = codes.reshape(len(images), net.num_heads, net.tokens, width)
            elif part == "proj":
                by_head = codes.reshape(len(images), net.num_heads, net.tokens, width)
                codes = by_head.transpose(0, 2, 1, 3).reshape(len(images), net.tokens, net.attention_dim)
            elif part == "head":
                codes = codes[:, 0]
            found[self._name(part, block, branch)] = codes
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
        net = self.architecture
        expected = (net.channels, *net.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise DataError(
                f"{net.name} takes images of shape (B, {', '.join(map(str, expected))}), not {images.shape}."
            )
        images = np.ascontiguousarray(images, np.float32)
        # The sum is finite unless a value is not (or the values are of no image): the quick check first.
        if not np.isfinite(images.sum()) and not np.isfinite(images).all():
            raise DataError("The images hold a NaN or an infinity.")
        return images

    def _name(self, part: str, block: int, branch: int) -> str:
        """Return the file's name of a quantizer from the kernels'."""
        net = self.architecture
        if part in ("patch", "head"):
            return "patch_embed.proj" if part == "patch" else net.head_names[branch]
        attentions, mlps = net.stages(block)
        if part not in ("up", "gate", "down"):
            return f"{attentions[branch].name}.{part}"
        gate, up = ("fc1_g", "fc1_x") if net.mlp == "swiglu" else ("", "fc1")
        layer = {"up": up, "gate": gate, "down": "fc2"}[part]
        return f"{mlps[branch].name}.{layer}"


def processors() -> int:
    """Return how many processors this process may use: a container or taskset may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Parts:
    """Takes the parts of a packed model, by name, as the kernels want them."""

    def __init__(self, packed: PackedModel) -> None:
        self.packed, self.net, self.tensors = packed, packed.architecture, packed.tensors

    def take(self, name: str) -> NDArray[np.float32]:
        return self.tensors.pop(name)

    def linear(self, name: str) -> dict[str, Any]:
        bits = self.packed.bits[name]
        return {
            "codes": self.tensors.pop(f"{name}.codes"),
            "weight_bits": bits.weight,
            "scale": self.take(f"{name}.scale"),
            "bias": self.take(f"{name}.bias"),
            "input_scale": float(self.take(f"{name}.input_scale")[0]),
            "input_offset": float(self.take(f"{name}.input_offset")[0]),
            "input_bits": bits.activation,
        }

    def norm(self, name: str, norm: Norm | None) -> dict[str, Any] | None:
        if norm is None:
            return None
        return {
            "rms": norm.kind == "rms",
            "eps": norm.eps,
            "weight": self.take(f"{name}.weight"),
            "bias": self.take(f"{name}.bias"),
        }

    def operand(self, name: str) -> dict[str, Any]:
        part = {"scale": self.take(f"{name}.scale"), "bits": self.packed.bits[name].activation}
        return part if name.endswith(".attention") else {**part, "offset": self.take(f"{name}.offset")}

    def rectified(self, name: str, operand: str) -> dict[str, Any]:
        """Queries or keys: their quantizer, and the norm and rectifier before it."""
        part = self.operand(f"{name}.{operand}")
        part["norm"] = self.norm(f"{name}.{operand[0]}_norm", self.net.qk_norm)
        if self.net.rectify == "token":
            for value in ("gamma", "beta"):
                part[value] = self.take(f"{name}.{operand}_rectifier.{value}")
            part["eps"] = RECTIFIER_EPS
        return part

    def attention(self, branch: Branch) -> dict[str, Any]:
        name = branch.name
        return {
            "norm": self.norm(branch.norm, self.net.norm),
            "qkv": self.linear(f"{name}.qkv"),
            "query": self.rectified(name, "query"),
            "key": self.rectified(name, "key"),
            "value": self.operand(f"{name}.value"),
            "attention": self.operand(f"{name}.attention"),
            "inner": self.norm(f"{name}.norm", self.net.attention_norm),
            "proj": self.linear(f"{name}.proj"),
        }

    def mlp(self, branch: Branch) -> dict[str, Any]:
        name, net = branch.name, self.net
        part = {
            "norm": self.norm(branch.norm, net.norm),
            "hidden": net.mlp_hidden,
            "kind": {"plain": "plain", "swiglu": "split"}.get(net.mlp, "last_half" if net.gate_last else "first_half"),
            "activation": net.activation,
            "inner": self.norm(f"{name}.norm", net.mlp_norm),
            "down": self.linear(f"{name}.fc2"),
        }
        if net.mlp == "swiglu":
            return {**part, "gate": self.linear(f"{name}.fc1_g"), "up": self.linear(f"{name}.fc1_x")}
        return {**part, "up": self.linear(f"{name}.fc1")}


def _build(packed: PackedModel, instruction_set: str, threads: int) -> _kernels.Model:
    net, parts = packed.architecture, _Parts(packed)
    shape = {
        "channels": net.channels,
        "height": net.image_size[0],
        "width": net.image_size[1],
        "patch_height": net.patch_size[0],
        "patch_width": net.patch_size[1],
        "embed_dim": net.embed_dim,
        "heads": net.num_heads,
        "head_dim": net.head_dim,
        "prefix": net.prefix_tokens,
        "skip": net.pool_skip,
        "classes": net.class_count,
        "attention_scale": net.attention_scale,
        "pool": net.pool,
    }
    model = _kernels.Model(instruction_set, shape, threads)
    model.set_embedding(
        {
            "patch": parts.linear("patch_embed.proj"),
            "norm": parts.norm("patch_embed.norm", net.embed_norm),
            "prefix": parts.tensors.pop("prefix_tokens", None),
            "positions": parts.tensors.pop("position_embedding", None),
            "pre_norm": parts.norm("norm_pre", net.pre_norm),
        }
    )
    for block in range(net.depth):
        attentions, mlps = net.stages(block)
        model.add_block(
            {
                "post": net.block == "post",
                "attentions": [parts.attention(branch) for branch in attentions],
                "mlps": [parts.mlp(branch) for branch in mlps],
            }
        )
    model.set_head(
        {
            "norm": parts.norm("norm", net.final_norm),
            "pool_norm": parts.norm("fc_norm", net.pool_norm),
            "heads": [parts.linear(name) for name in net.head_names],
        }
    )
    return model
