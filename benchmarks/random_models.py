"""Packed models with random codes, for benchmarks of speed and memory: those depend on the sizes alone.

Example: python benchmarks/random_models.py deit_small_patch16_224 --bits 4 --out small.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch

from qvit import QuantConfig, quantize
from qvit.bench.random_model import random_model
from qvit.format.packed import write_packed
from qvit.format.program import Program
from qvit.models.families import lower

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "swin_tiny_patch4_window7_224")


def program(name: str, bits: int = 4, image_size: int = 224, activation_bits: int | None = None) -> Program:
    """Return the program of a student of timm's model ``name`` for square images of ``image_size`` pixels."""
    config = QuantConfig(bits, bits if activation_bits is None else activation_bits)
    with torch.device("meta"):
        student = quantize(timm.create_model(name, img_size=image_size), config)
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


def write_random(path: Path, name: str, bits: int, image_size: int = 224, activation_bits: int | None = None) -> Path:
    """Write a packed model with random codes; return ``path``."""
    model = random_model(program(name, bits, image_size, activation_bits))
    write_packed(path, dataclasses.replace(model, preprocessing=preprocessing(image_size)))
    return path


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, help="those of the weights by default")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_random(arguments.out, arguments.name, arguments.bits, arguments.image_size, arguments.activation_bits)


if __name__ == "__main__":
    main()
