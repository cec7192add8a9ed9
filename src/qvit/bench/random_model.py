"""Packed models with random codes, to measure speed and memory: those depend on the sizes alone. No PyTorch here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qvit.format.branches import Attention, Residual
from qvit.format.codes import pack_codes
from qvit.format.ops import Norm
from qvit.format.packed import PackedModel
from qvit.format.program import Program


def random_model(program: Program) -> PackedModel:
    """Return a model of a program with random codes and scales that keep all values of ordinary size."""
    rng = np.random.default_rng(0)
    norms = {f"{norm.name}.weight" for norm in _norms(program)}
    tensors = {}
    for entry, (dtype, shape) in program.entries().items():
        tensors[entry] = np.zeros(shape, dtype)
        if entry in ("prefix_tokens", "position_embedding"):
            tensors[entry] = rng.standard_normal(shape, np.float32)
        elif entry in norms or entry.endswith("_rectifier.gamma"):
            tensors[entry] += 1
    for layer in program.layers().values():
        half = 2 ** (layer.bits.weight - 1)
        codes = rng.integers(-half, half, (layer.outputs, layer.inputs))
        tensors[f"{layer.name}.codes"] = pack_codes(codes, layer.bits.weight)
        tensors[f"{layer.name}.scale"] += 1 / (codes.std() * layer.inputs**0.5)
        tensors[f"{layer.name}.input_scale"] += 6 / 2**layer.bits.activation  # from -3 to 3
    for attention, (operation, x) in program.attentions().items():
        for operand in ("query", "key", "value"):
            tensors[f"{attention}.{operand}.scale"] += 6 / 2 ** getattr(operation, operand)
        group = operation.group(x) if isinstance(operation, Attention) else x.tokens
        tensors[f"{attention}.map.scale"] += 4 / group / 2**operation.map
    return with_tensors(program, tensors)


def with_tensors(program: Program, tensors: dict[str, np.ndarray]) -> PackedModel:
    """Return a packed model of some tensors, with a preprocessing that fits, and classes that are numbered."""
    channels = program.input[0]
    preprocessing = {
        "input_size": list(program.input),
        "mean": [0.5] * channels,
        "std": [0.25] * channels,
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    classes = [f"class {number}" for number in range(program.output if program.classifies else 0)]
    return PackedModel(program, preprocessing, classes, {"weights": "random"}, tensors)


def _norms(program: Program) -> Iterator[Norm]:
    for operation in program.operations:
        parts = operation.branches if isinstance(operation, Residual) else (operation,)
        for part in parts:
            found = [part] if isinstance(part, Norm) else list(vars(part).values())
            yield from (norm for norm in found if isinstance(norm, Norm))
