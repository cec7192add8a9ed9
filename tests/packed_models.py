"""Random packed models, made without PyTorch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from qvit.bench.random_model import with_tensors
from qvit.config import Bits
from qvit.format.branches import Attention, Mlp, Residual
from qvit.format.codes import pack_codes
from qvit.format.ops import OPERANDS, Classify, Embed, Layer, Norm, Operation, Pool, Tokens
from qvit.format.packed import PackedModel
from qvit.format.program import Program

LAYER = ("layer", 1e-6)
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
    "query_norm": None,
    "key_norm": None,
    "attention_norm": None,
    "mlp_norm": None,
    "block": "pre",
    "parallel": 1,
    "rectifier": None,
    "mlp": "plain",
    "mlp_hidden": 14,
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


def vit_program(bits: int | dict[str, Bits], **fields: Any) -> Program:
    """Return the program of a plain vision transformer: ``TINY`` with ``fields`` changed.

    Args:
        bits: of everything, or of every layer and operand by name.
        fields: see ``TINY``.
    """
    assert fields.keys() <= TINY.keys(), fields.keys() - TINY.keys()
    f = SimpleNamespace(**{**TINY, **fields})
    width, attention_width, hidden = f.embed_dim, f.num_heads * f.head_dim, f.mlp_hidden

    def layer(name: str, inputs: int, outputs: int) -> Layer:
        return Layer(name, inputs, outputs, Bits(bits, bits) if isinstance(bits, int) else bits[name])

    def norm(name: str, kind: tuple[str, float] | None) -> Norm | None:
        return None if kind is None else Norm(name, *kind)

    def operand(name: str) -> int:
        return bits if isinstance(bits, int) else bits[name].activation

    def attention(name: str, norm_name: str) -> Attention:
        return Attention(
            name=name,
            heads=f.num_heads,
            head_dim=f.head_dim,
            scale=f.attention_scale,
            norm=norm(norm_name, f.norm),
            qkv=layer(f"{name}.qkv", width, 3 * attention_width),
            query_norm=norm(f"{name}.q_norm", f.query_norm or f.qk_norm),
            key_norm=norm(f"{name}.k_norm", f.key_norm or f.qk_norm),
            rectifier=f.rectifier,
            **{part: operand(f"{name}.{part}") for part in OPERANDS},
            inner_norm=norm(f"{name}.norm", f.attention_norm),
            proj=layer(f"{name}.proj", attention_width, width),
        )

    def mlp(name: str, norm_name: str) -> Mlp:
        glu = f.mlp in ("glu", "glu_gate_last")
        first = "fc1_x" if f.mlp == "swiglu" else "fc1"
        return Mlp(
            name=name,
            kind=f.mlp,
            activation=f.activation,
            norm=norm(norm_name, f.norm),
            gate=layer(f"{name}.fc1_g", width, hidden) if f.mlp == "swiglu" else None,
            fc1=layer(f"{name}.{first}", width, 2 * hidden if glu else hidden),
            inner_norm=norm(f"{name}.norm", f.mlp_norm),
            fc2=layer(f"{name}.fc2", hidden, width),
        )

    prefix = f.class_token + f.distillation_token + f.register_tokens
    patch = f.channels * f.patch_size[0] * f.patch_size[1]
    operations: list[Operation | None] = [
        Embed(f.patch_size, layer("patch_embed.proj", patch, width)),
        norm("patch_embed.norm", f.embed_norm),
        Tokens(prefix, f.position_embedding != "none"),
        norm("norm_pre", f.pre_norm),
    ]
    for block in range(f.depth):
        at = f"blocks.{block}"
        if f.block == "parallel":
            attentions = [attention(f"{at}.attns.{j}.attn", f"{at}.attns.{j}.norm") for j in range(f.parallel)]
            mlps = [mlp(f"{at}.ffns.{j}.mlp", f"{at}.ffns.{j}.norm") for j in range(f.parallel)]
        else:
            attentions, mlps = [attention(f"{at}.attn", f"{at}.norm1")], [mlp(f"{at}.mlp", f"{at}.norm2")]
        operations += [Residual(tuple(branches), f.block == "post") for branches in (attentions, mlps)]
    heads = ("head", "head_dist") if f.distillation_token else ("head",)
    operations += [
        norm("norm", f.final_norm),
        Pool(f.pool, tokens=len(heads), skip=f.pool_skip),
        norm("fc_norm", f.pool_norm),
        Classify(tuple(layer(name, width, f.class_count) for name in heads)),
    ]
    return Program(f.name, (f.channels, *f.image_size), tuple(op for op in operations if op is not None))


def make_packed(bits: int | dict[str, Bits] = 3, seed: int = 0, **fields: Any) -> PackedModel:
    """Return a model of random codes and values: :func:`vit_program` of ``fields``."""
    return random_packed(vit_program(bits, **fields), seed)


def random_packed(program: Program, seed: int = 0) -> PackedModel:
    """Return a packed model of a program, of random codes and values; few codes of its activations are clipped."""
    rng = np.random.default_rng(seed)
    layers = program.layers()
    tensors: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in program.entries().items():
        owner, _, kind = name.rpartition(".")
        if kind == "codes":
            bits = layers[owner].bits.weight
            codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (shape[0], layers[owner].inputs))
            tensors[name] = pack_codes(codes, bits)
        else:
            tensors[name] = _values(kind, _step(owner, kind, program), shape, rng).astype(dtype)
    return dataclasses.replace(with_tensors(program, tensors), origin={"method": "random"})


def _step(owner: str, kind: str, program: Program) -> float:
    """Return the size of a scale: values around 1 in all layers, three times as large at the ends of a range."""
    layer, bits = program.layers().get(owner), program.bits()
    if kind == "scale" and layer is not None:
        return 3**0.5 / (2 ** (layer.bits.weight - 1) * layer.inputs**0.5)
    if kind == "scale" and owner.endswith(".map"):
        return 0.5 / (2 ** bits[owner].activation - 1)
    return 3 / 2 ** (bits[owner].activation - 1) if kind in ("scale", "input_scale") else 1.0


def _values(kind: str, step: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if kind in ("scale", "input_scale", "weight", "gamma", "factor"):
        return step * rng.uniform(0.6, 1.4, shape)
    return rng.normal(0, 0.3, shape)
