"""Random packed models, made without PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np

from qvit.config import Bits
from qvit.format.architecture import Architecture, Norm
from qvit.format.codes import pack_codes
from qvit.format.packed import PackedModel, expected_entries

LAYER = Norm("layer", 1e-6)
TINY: dict[str, Any] = {
    "name": "tiny",
    "image_size": (8, 8),
    "patch_size": (4, 4),
    "channels": 3,
    "embed_dim": 10,
    "num_heads": 2,
    "head_dim": 4,
    "depth": 2,
    "class_token": True,
    "distillation_token": False,
    "register_tokens": 0,
    "position_embedding": "all",
    "norm": LAYER,
    "embed_norm": None,
    "pre_norm": None,
    "final_norm": LAYER,
    "pool_norm": None,
    "qk_norm": None,
    "attention_norm": None,
    "mlp_norm": None,
    "block": "pre",
    "parallel": 1,
    "rectify": None,
    "mlp": "plain",
    "mlp_hidden": 14,
    "gate_last": False,
    "activation": "gelu",
    "attention_scale": 0.5,
    "pool": "token",
    "pool_skip": 0,
    "class_count": 5,
}
DEIT_SMALL: dict[str, Any] = {
    **TINY,
    "name": "deit_small_patch16_224",
    "image_size": (224, 224),
    "patch_size": (16, 16),
    "embed_dim": 384,
    "num_heads": 6,
    "head_dim": 64,
    "depth": 12,
    "mlp_hidden": 1536,
    "attention_scale": 0.125,
    "class_count": 1000,
}


def make_packed(bits: int | dict[str, Bits] = 3, seed: int = 0, **changes: Any) -> PackedModel:
    """Return a model of random codes and values: ``TINY`` with ``changes``."""
    net = Architecture(**{**TINY, **changes})
    widths = {name: Bits(bits, bits) for name in net.bit_names()} if isinstance(bits, int) else bits
    rng = np.random.default_rng(seed)
    inputs = {linear.name: linear.inputs for linear in net.linear_layers()}
    tensors: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in expected_entries(net, widths).items():
        layer, _, kind = name.rpartition(".")
        if kind == "codes":
            width = widths[layer].weight
            codes = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), (shape[0], inputs[layer]))
            tensors[name] = pack_codes(codes, width)
        elif kind in ("input_scale", "gamma") or (kind == "scale" and layer not in inputs):
            tensors[name] = rng.uniform(0.1, 0.4, shape).astype(dtype)
        else:
            tensors[name] = rng.normal(0, 0.3, shape).astype(dtype)
    preprocessing = {
        "input_size": [net.channels, *net.image_size],
        "mean": [0.5] * net.channels,
        "std": [0.25] * net.channels,
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    classes = [f"class {n}" for n in range(net.class_count)]
    return PackedModel(net, widths, preprocessing, classes, {"method": "random"}, tensors)
