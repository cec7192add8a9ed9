"""The random number generators of a process: seeded for one sample, and kept in a checkpoint as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_NUMPY_WORDS = 624  # of a Mersenne twister


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from generators seeded with ``seed`` (below 2^32) inside, and leave those outside as they were.

    torchvision draws from PyTorch's generator, timm from NumPy's and Python's. ``None`` changes nothing.
    """
    if seed is None:
        yield
        return
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    # Not torch.manual_seed: that one also seeds the GPU, which a sample does not draw from.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)


def random_state() -> dict[str, Any]:
    """Return the state of this process's generators, as tensors and plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put this process's generators where :func:`random_state` found them.

    Raises:
        ValueError: for what is no such state; or what Python, NumPy and PyTorch raise for it.
    """
    if not isinstance(state, dict):
        raise ValueError("no state of generators")
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    # NumPy would believe any position, and read there.
    if keys.shape != (_NUMPY_WORDS,) or type(position) is not int or not 0 <= position <= _NUMPY_WORDS:
        raise ValueError("no state of NumPy's generator")
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
