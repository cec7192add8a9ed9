"""A packed program as the kernels take it: every operation a dict of plain values and arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvit.errors import ConfigError
from qvit.format.branches import Attention, AttentionPool, Mlp, Residual
from qvit.format.ops import Classify, Embed, Layer, Merge, Norm, Pool, Stream, Tokens
from qvit.format.program import Program

RECTIFIER_EPS = 1e-6
"""Under the root of a token rectifier's variance (docs/method.md, section 2)."""

Part = dict[str, Any]
Tensors = dict[str, NDArray[Any]]


def program_parts(program: Program, tensors: Tensors) -> Iterator[Part]:
    """Yield every operation with its arrays, in the order they run.

    Args:
        program: of a packed file.
        tensors: of the same file; arrays are taken out as they are used, so that their memory can be freed early.

    Raises:
        ConfigError: naming an operation that the kernels do not have.
    """
    take = _Taker(tensors)
    for operation in program.operations:
        if type(operation) not in PARTS:
            raise ConfigError(f"The engine has no operation {operation.op!r}: it runs in the reference alone.")
    for operation, x in program.walk():
        yield {"op": operation.op, **PARTS[type(operation)](take, operation, x)}


class _Taker:
    """Takes arrays out of a packed model, by name."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self._tables: Tensors = {}

    def array(self, name: str) -> NDArray[Any]:
        """Take one array."""
        return self.tensors.pop(name)

    def table(self, name: str) -> NDArray[Any]:
        """Take a table that several operations may share."""
        if name not in self._tables:
            self._tables[name] = self.array(name)
        return self._tables[name]

    def layer(self, layer: Layer) -> Part:
        """Take a linear layer."""
        name = layer.name
        return {
            "outputs": layer.outputs,
            "inputs": layer.inputs,
            "codes": self.array(f"{name}.codes"),
            "weight_bits": layer.bits.weight,
            "scale": self.array(f"{name}.scale"),
            "bias": self.array(f"{name}.bias"),
            "input_scale": float(self.array(f"{name}.input_scale")[0]),
            "input_offset": float(self.array(f"{name}.input_offset")[0]),
            "input_bits": layer.bits.activation,
        }

    def norm(self, norm: Norm | None) -> Part | None:
        """Take a norm, if there is one."""
        if norm is None:
            return None
        weight, bias = self.array(f"{norm.name}.weight"), self.array(f"{norm.name}.bias")
        return {"rms": norm.kind == "rms", "eps": norm.eps, "weight": weight, "bias": bias}

    def operand(self, name: str, bits: int) -> Part:
        """Take the quantizer of an operand of the attention products, signed if it has an offset."""
        part = {"bits": bits, "scale": self.array(f"{name}.scale")}
        return part if name.endswith(".map") else {**part, "offset": self.array(f"{name}.offset")}


def _embed(take: _Taker, op: Embed, x: Stream) -> Part:
    return {"patch": op.patch, "layer": take.layer(op.layer)}


def _tokens(take: _Taker, op: Tokens, x: Stream) -> Part:
    return {
        "prefix": take.array("prefix_tokens") if op.prefix else None,
        "position": take.array("position_embedding") if op.position else None,
    }


def _norm(take: _Taker, op: Norm, x: Stream) -> Part:
    return {"norm": take.norm(op)}


def _residual(take: _Taker, op: Residual, x: Stream) -> Part:
    branches = [{"op": branch.op, **PARTS[type(branch)](take, branch, x)} for branch in op.branches]
    return {"post": op.post, "branches": branches}


def _attention(take: _Taker, op: Attention, x: Stream) -> Part:
    operands = {}
    for operand, norm in (("query", op.query_norm), ("key", op.key_norm)):
        name = f"{op.name}.{operand}"
        part = {**take.operand(name, getattr(op, operand)), "norm": take.norm(norm), "eps": RECTIFIER_EPS}
        parts = {None: (), "token": ("gamma", "beta"), "affine": ("factor", "shift")}[op.rectifier]
        operands[operand] = {**part, **{value: take.array(f"{name}_rectifier.{value}") for value in parts}}
    return {
        "heads": op.heads,
        "head_dim": op.head_dim,
        "norm": take.norm(op.norm),
        "qkv": take.layer(op.qkv),
        **operands,
        "value": take.operand(f"{op.name}.value", op.value),
        "map": take.operand(f"{op.name}.map", op.map),
        "logit_scale": take.array(f"{op.name}.logit_scale")
        if op.scale is None
        else np.full(op.heads, op.scale, np.float32),
        "rotary": op.rotary
        and {
            "halves": op.rotary.layout == "halves",
            "cos": take.table(f"{op.rotary.name}.cos"),
            "sin": take.table(f"{op.rotary.name}.sin"),
        },
        "window": op.window,
        "shift": op.shift,
        "bias": take.array(f"{op.name}.relative_position_bias") if op.bias else None,
        "inner_norm": take.norm(op.inner_norm),
        "proj": take.layer(op.proj),
    }


def _mlp(take: _Taker, op: Mlp, x: Stream) -> Part:
    return {
        "kind": op.kind,
        "activation": op.activation,
        "norm": take.norm(op.norm),
        "gate": take.layer(op.gate) if op.gate is not None else None,
        "fc1": take.layer(op.fc1),
        "inner_norm": take.norm(op.inner_norm),
        "fc2": take.layer(op.fc2),
    }


def _merge(take: _Taker, op: Merge, x: Stream) -> Part:
    return {"norm": take.norm(op.norm), "layer": take.layer(op.layer)}


def _pool(take: _Taker, op: Pool, x: Stream) -> Part:
    return {"kind": op.kind, "tokens": op.tokens, "skip": op.skip}


def _attention_pool(take: _Taker, op: AttentionPool, x: Stream) -> Part:
    key = {**take.operand(f"{op.name}.key", op.key), "norm": take.norm(op.key_norm)}
    return {
        "heads": op.heads,
        "head_dim": op.head_dim,
        "logit_scale": np.full(op.heads, op.scale, np.float32),
        "latent": take.array(f"{op.name}.latent"),
        "kv": take.layer(op.kv),
        "query": take.operand(f"{op.name}.query", op.query),
        "key": key,
        "value": take.operand(f"{op.name}.value", op.value),
        "map": take.operand(f"{op.name}.map", op.map),
        "proj": take.layer(op.proj),
    }


def _classify(take: _Taker, op: Classify, x: Stream) -> Part:
    return {"heads": [take.layer(layer) for layer in op.heads]}


PARTS: dict[type, Callable[[_Taker, Any, Stream], Part]] = {
    Embed: _embed,
    Tokens: _tokens,
    Norm: _norm,
    Residual: _residual,
    Attention: _attention,
    Mlp: _mlp,
    Merge: _merge,
    Pool: _pool,
    AttentionPool: _attention_pool,
    Classify: _classify,
}
"""What makes an operation's part."""
