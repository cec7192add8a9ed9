"""Every operation of a packed file as nodes of an ONNX graph: the same as in :mod:`qvit.runtime.reference`.

No PyTorch here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from qvit.exporting.onnx_attention import attention, attention_pool
from qvit.exporting.onnx_builder import Builder
from qvit.exporting.onnx_graph import Value
from qvit.format.branches import Attention, AttentionPool, Mlp, Residual
from qvit.format.ops import Classify, Embed, Merge, Norm, Pool, Stream, Tokens


def _embed(to: Builder, op: Embed, x: Stream, images: Value) -> Value:
    graph, (height, width) = to.graph, op.patch
    rows, columns = x.grid[0] // height, x.grid[1] // width
    if x.grid != (rows * height, columns * width):
        ends = graph.integers(rows * height, columns * width)
        images = graph.node("Slice", images, graph.integers(0, 0), ends, graph.integers(2, 3))
    cut = graph.reshape(images, -1, x.width, rows, height, columns, width)
    patches = graph.node("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
    return to.layer(op.layer, graph.reshape(patches, -1, rows * columns, op.layer.inputs))


def _tokens(to: Builder, op: Tokens, x: Stream, values: Value) -> Value:
    graph = to.graph
    if op.position:
        values = graph.node("Add", values, to.tensor("position_embedding"))
    if op.prefix:
        # Rows of zeros before the patches, to which the prefix tokens are added: so no shape depends on the batch.
        before = graph.node("Pad", values, graph.integers(0, op.prefix, 0, 0, 0, 0))
        prefix = graph.node("Pad", to.tensor("prefix_tokens"), graph.integers(0, 0, x.tokens, 0))
        values = graph.node("Add", before, prefix)
    return values


def _norm(to: Builder, op: Norm, x: Stream, values: Value) -> Value:
    return to.norm(op, values)


def _residual(to: Builder, op: Residual, x: Stream, values: Value) -> Value:
    branches = []
    for branch in op.branches:
        build = BUILD[type(branch)]
        if op.post:
            branches.append(to.norm(branch.norm, build(to, branch, x, values)))
        else:
            branches.append(build(to, branch, x, to.norm(branch.norm, values)))
    return to.graph.node("Add", values, _sum(to, branches))


def _mlp(to: Builder, op: Mlp, x: Stream, values: Value) -> Value:
    graph = to.graph
    if op.kind == "plain":
        hidden = to.activate(to.layer(op.fc1, values), op.activation)
    else:
        if op.gate is not None:
            gate, value = to.layer(op.gate, values), to.layer(op.fc1, values)
        else:
            gate, value = graph.split(to.layer(op.fc1, values), 2, axis=-1)
            if op.kind == "glu_gate_last":
                gate, value = value, gate
        hidden = graph.node("Mul", to.activate(gate, op.activation), value)
    return to.layer(op.fc2, to.norm(op.inner_norm, hidden))


def _merge(to: Builder, op: Merge, x: Stream, values: Value) -> Value:
    graph, (rows, columns) = to.graph, x.grid
    parts = graph.reshape(values, -1, rows // 2, 2, columns // 2, 2, x.width)
    parts = graph.node("Transpose", parts, perm=[0, 1, 3, 4, 2, 5])
    return to.layer(op.layer, to.norm(op.norm, graph.reshape(parts, -1, x.tokens // 4, 4 * x.width)))


def _pool(to: Builder, op: Pool, x: Stream, values: Value) -> Value:
    graph = to.graph
    if op.kind == "token":
        return _rows(to, values, 0, op.tokens)
    if op.skip:
        values = _rows(to, values, op.skip, x.tokens)
    pooled = []
    if op.kind in ("avg", "avgmax"):
        pooled.append(to.mean(values, axis=1))
    if op.kind in ("max", "avgmax"):
        pooled.append(graph.node("ReduceMax", values, graph.integers(1)))
    return _average(to, pooled)


def _classify(to: Builder, op: Classify, x: Stream, values: Value) -> Value:
    graph = to.graph
    vectors = [graph.node("Gather", values, graph.constant(np.array(n)), axis=1) for n in range(len(op.heads))]
    return _average(to, [to.layer(layer, vector) for layer, vector in zip(op.heads, vectors, strict=True)])


def _rows(to: Builder, values: Value, start: int, stop: int) -> Value:
    """Return some rows of ``(B, rows, width)``."""
    integers = to.graph.integers
    return to.graph.node("Slice", values, integers(start), integers(stop), integers(1))


def _sum(to: Builder, values: list[Value]) -> Value:
    return reduce(lambda total, value: to.graph.node("Add", total, value), values)


def _average(to: Builder, values: list[Value]) -> Value:
    total = _sum(to, values)
    return total if len(values) == 1 else to.graph.node("Div", total, to.graph.scalar(len(values)))


Step = Callable[[Builder, Any, Stream, Value], Value]
BUILD: dict[type, Step] = {
    Embed: _embed,
    Tokens: _tokens,
    Norm: _norm,
    Residual: _residual,
    Attention: attention,
    Mlp: _mlp,
    Merge: _merge,
    Pool: _pool,
    AttentionPool: attention_pool,
    Classify: _classify,
}
"""What adds an operation's nodes: called with the builder, the operation, what flows in, and its value ``(B, ...)``."""
