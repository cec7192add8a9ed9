"""Packed DeiT models with random codes, for benchmarks of speed and memory: those depend on the sizes alone.

Example: python benchmarks/random_models.py deit_small_patch16_224 --bits 4 --out small.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from qvit.config import Bits
from qvit.format.architecture import Architecture, Norm
from qvit.format.codes import pack_codes
from qvit.format.packed import PackedModel, expected_entries, write_packed

HEADS = {"deit_tiny_patch16_224": 3, "deit_small_patch16_224": 6, "deit_base_patch16_224": 12}
"""Of 64 channels each; the sizes of a DeiT follow from them."""
CLASSES = 1000


def architecture(name: str, image_size: int = 224) -> Architecture:
    """Return the architecture of a DeiT with head rectifiers for square images of ``image_size`` pixels."""
    norm = Norm("layer", 1e-6)
    return Architecture(
        name=name,
        image_size=(image_size, image_size),
        patch_size=(16, 16),
        channels=3,
        embed_dim=64 * HEADS[name],
        num_heads=HEADS[name],
        head_dim=64,
        depth=12,
        class_token=True,
        distillation_token=False,
        register_tokens=0,
        position_embedding="all",
        norm=norm,
        embed_norm=None,
        pre_norm=None,
        final_norm=norm,
        pool_norm=None,
        qk_norm=None,
        attention_norm=None,
        mlp_norm=None,
        block="pre",
        parallel=1,
        rectify="head",
        mlp="plain",
        mlp_hidden=256 * HEADS[name],
        gate_last=False,
        activation="gelu",
        attention_scale=64**-0.5,
        pool="token",
        pool_skip=0,
        class_count=CLASSES,
    )


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
    net = architecture(name, image_size)
    all_bits = {
        layer: Bits(8, 8) if layer in ("patch_embed.proj", "head") else Bits(bits, bits) for layer in net.bit_names()
    }
    rng = np.random.default_rng(0)
    tensors = {}
    for entry, (dtype, shape) in expected_entries(net, all_bits).items():
        tensors[entry] = np.zeros(shape, dtype)
        if entry in ("prefix_tokens", "position_embedding"):
            tensors[entry] = rng.standard_normal(shape, np.float32)
        elif entry.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            tensors[entry] += 1
    for layer in net.linear_layers():
        width = all_bits[layer.name]
        half = 2 ** (width.weight - 1)
        codes = rng.integers(-half, half, (layer.outputs, layer.inputs))
        tensors[f"{layer.name}.codes"] = pack_codes(codes, width.weight)
        tensors[f"{layer.name}.scale"] += 1 / (codes.std() * layer.inputs**0.5)
        tensors[f"{layer.name}.input_scale"] += 6 / 2**width.activation  # from -3 to 3
    for block in range(net.depth):
        for operand in ("query", "key", "value"):
            tensors[f"blocks.{block}.attn.{operand}.scale"] += 6 / 2**bits
        tensors[f"blocks.{block}.attn.attention.scale"] += 4 / net.tokens / 2**bits
    classes = [f"class {number}" for number in range(CLASSES)]
    write_packed(path, PackedModel(net, all_bits, preprocessing(image_size), classes, {"weights": "random"}, tensors))
    return path


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=HEADS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_random(arguments.out, arguments.name, arguments.bits, arguments.image_size)


if __name__ == "__main__":
    main()
