"""Packed models with random codes, for benchmarks of speed and memory: those depend on the sizes alone.

Example: python benchmarks/random_models.py deit_small_patch16_224 --bits 4 --out small.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from qvit import QuantConfig, quantize
from qvit.format.branches import Attention, Residual
from qvit.format.codes import pack_codes
from qvit.format.ops import Norm
from qvit.format.packed import PackedModel, write_packed
from qvit.format.program import Program
from qvit.models.families import lower

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "swin_tiny_patch4_window7_224")
CLASSES = 1000


def program(name: str, bits: int = 4, image_size: int = 224) -> Program:
    """Return the program of a student of timm's model ``name`` for square images of ``image_size`` pixels."""
    with torch.device("meta"):
        student = quantize(timm.create_model(name, img_size=image_size), QuantConfig(bits, bits))
    return lower(student, (image_size, image_size))[0]


def preprocessing(image_size: int) -> dict[str, Any]:
    """Return DeiT's preprocessing."""
    return {
        "input_size": [3, image_size, image_size],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }


def write_random(path: Path, name: str, bits: int, image_size: int = 224) -> Path:
    """Write a packed model with random codes and scales that keep all values of ordinary size; return ``path``."""
    net = program(name, bits, image_size)
    rng = np.random.default_rng(0)
    norms = {f"{norm.name}.weight" for norm in _norms(net)}
    tensors = {}
    for entry, (dtype, shape) in net.entries().items():
        tensors[entry] = np.zeros(shape, dtype)
        if entry in ("prefix_tokens", "position_embedding"):
            tensors[entry] = rng.standard_normal(shape, np.float32)
        elif entry in norms:
            tensors[entry] += 1
    for layer in net.layers().values():
        half = 2 ** (layer.bits.weight - 1)
        codes = rng.integers(-half, half, (layer.outputs, layer.inputs))
        tensors[f"{layer.name}.codes"] = pack_codes(codes, layer.bits.weight)
        tensors[f"{layer.name}.scale"] += 1 / (codes.std() * layer.inputs**0.5)
        tensors[f"{layer.name}.input_scale"] += 6 / 2**layer.bits.activation  # from -3 to 3
    for attention, (operation, x) in net.attentions().items():
        for operand in ("query", "key", "value"):
            tensors[f"{attention}.{operand}.scale"] += 6 / 2 ** getattr(operation, operand)
        group = operation.group(x) if isinstance(operation, Attention) else x.tokens
        tensors[f"{attention}.map.scale"] += 4 / group / 2**operation.map
    classes = [f"class {number}" for number in range(CLASSES)]
    write_packed(path, PackedModel(net, preprocessing(image_size), classes, {"weights": "random"}, tensors))
    return path


def _norms(net: Program) -> Iterator[Norm]:
    for operation in net.operations:
        parts = operation.branches if isinstance(operation, Residual) else (operation,)
        for part in parts:
            found = [part] if isinstance(part, Norm) else list(vars(part).values())
            yield from (norm for norm in found if isinstance(norm, Norm))


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_random(arguments.out, arguments.name, arguments.bits, arguments.image_size)


if __name__ == "__main__":
    main()
