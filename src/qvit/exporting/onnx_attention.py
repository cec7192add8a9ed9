"""Attention as nodes of an ONNX graph: over all tokens, inside windows, and the pooling by attention.

Windows are an axis of their own, ``(B, windows, H, N, D)``, so that no shape but the first depends on the batch.
No PyTorch here.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from qvit.exporting.onnx_builder import Builder
from qvit.exporting.onnx_graph import Array, Value
from qvit.exporting.onnx_products import Quantized
from qvit.format.branches import Attention, AttentionPool
from qvit.format.ops import Stream
from qvit.runtime.parts import RECTIFIER_EPS
from qvit.runtime.reference import MASKED, Windows, bias_rows


def attention(to: Builder, op: Attention, x: Stream, values: Value) -> Value:
    """Add an attention to ``values (B, N, width)`` and return what it gives, of the same shape."""
    graph, group = to.graph, op.group(x)
    windows = None if op.window is None else Windows(x.grid, op.window, op.shift)
    if windows is not None:
        values = graph.node("Gather", values, graph.constant(windows.order.astype(np.int32)), axis=1)
    lead = () if windows is None else (len(windows.order),)
    q, k, v = (_heads(to, part, (*lead, group), op) for part in graph.split(to.layer(op.qkv, values), 3, axis=-1))
    q, k = to.head_norm(op.query_norm, q), to.head_norm(op.key_norm, k)
    if op.rotary is not None:
        q, k = _rotated(to, op, x, q), _rotated(to, op, x, k)
    q, k = _rectified(to, op, "query", q), _rectified(to, op, "key", k)
    out = _products(to, op, (q, k, v), _biases(to, op, x, windows), rank=len(lead) + 4)
    out = to.layer(op.proj, to.norm(op.inner_norm, _joined(to, out, (*lead, group), op)))
    if windows is None:
        return out
    back = np.argsort(windows.order.reshape(-1)).astype(np.int32)
    return graph.node("Gather", graph.reshape(out, -1, x.tokens, x.width), graph.constant(back), axis=1)


def attention_pool(to: Builder, op: AttentionPool, x: Stream, values: Value) -> Value:
    """Add a pooling by attention to ``values (B, N, width)`` and return one token, ``(B, 1, outputs)``."""
    k, v = (_heads(to, part, (x.tokens,), op) for part in to.graph.split(to.layer(op.kv, values), 2, axis=-1))
    q = to.graph.constant(to.array(f"{op.name}.latent")[None, :, None])
    out = _products(to, op, (q, to.head_norm(op.key_norm, k), v), [], rank=4)
    return to.layer(op.proj, _joined(to, out, (1,), op))


def _heads(to: Builder, x: Value, shape: tuple[int, ...], op: Attention | AttentionPool) -> Value:
    """Return ``(B, *shape, H * D)`` as ``(B, ..., H, N, D)``; the last of ``shape`` is N."""
    return _swapped(to, to.graph.reshape(x, -1, *shape, op.heads, op.head_dim), len(shape))


def _joined(to: Builder, x: Value, shape: tuple[int, ...], op: Attention | AttentionPool) -> Value:
    """Undo :func:`_heads`."""
    return to.graph.reshape(_swapped(to, x, len(shape)), -1, *shape, op.width)


def _swapped(to: Builder, x: Value, axis: int) -> Value:
    """Return ``x`` with an axis and the next one, the last but one, changed for one another."""
    return to.graph.node("Transpose", x, perm=[*range(axis), axis + 1, axis, axis + 2])


def _products(
    to: Builder, op: Attention | AttentionPool, qkv: tuple[Value, Value, Value], biases: list[Value], rank: int
) -> Value:
    """Return what attention gives for q, k and v ``(B, ..., H, N, D)``, each of which becomes codes first.

    ``softmax(scale * (a_q a_k Q K^T + z_q a_k colsum(K)) + biases)``: what the offset of the keys adds is the same for
    all keys of a query, so softmax takes it away again.
    """
    graph, name, (q, k, v) = to.graph, op.name, qkv
    a_q, a_k, a_v, a_p = (
        to.array(f"{name}.{part}.scale").astype(np.float64) for part in ("query", "key", "value", "map")
    )
    z_q, z_v = (to.array(f"{name}.{part}.offset").astype(np.float64) for part in ("query", "value"))
    scale = to.array(f"{name}.logit_scale").astype(np.float64) if op.scale is None else op.scale

    last = [*range(rank - 2), rank - 1, rank - 2]
    queries = to.operand(f"{name}.query", op.query, q)
    keys = to.operand(f"{name}.key", op.key, k, signed=to.products.signed(op.query, op.key))
    right = keys.codes._replace(value=graph.node("Transpose", keys.codes.value, perm=last))
    logits = _scaled(to, to.products.matmul(queries.codes, right), a_q * a_k * scale)
    columns = graph.node("Transpose", _sums(to, keys), perm=last)
    logits = graph.node("Add", logits, _scaled(to, columns, z_q * a_k * scale))
    for bias in biases:
        logits = graph.node("Add", logits, bias)
    weights = to.operand(f"{name}.map", op.map, graph.node("Softmax", logits, axis=-1))
    summed = to.operand(f"{name}.value", op.value, v, signed=to.products.signed(op.map, op.value))
    out = _scaled(to, to.products.matmul(weights.codes, summed.codes), a_p * a_v)
    return graph.node("Add", out, _scaled(to, _sums(to, weights), a_p * z_v))


def _sums(to: Builder, operand: Quantized) -> Value:
    """Return the sum of each row of codes."""
    return to.graph.node("ReduceSum", operand.whole, to.graph.integers(-1))


def _scaled(to: Builder, x: Value, factor: Array) -> Value:
    return to.graph.node("Mul", x, to.per_head(factor))


def _rotated(to: Builder, op: Attention, x: Stream, operand: Value) -> Value:
    """Return queries or keys ``(B, H, N, D)`` rotated; those of prefix tokens are turned by nothing."""
    graph, rotary, half = to.graph, op.rotary, op.head_dim // 2
    assert rotary is not None
    axis, pairs = (-2, (2, half)) if rotary.layout == "halves" else (-1, (half, 2))
    tables = []
    for part, neutral in (("cos", 1), ("sin", 0)):
        table = to.tensor(f"{rotary.name}.{part}")
        if x.prefix:
            table = graph.node("Pad", table, graph.integers(0, x.prefix, 0, 0, 0, 0), graph.scalar(neutral))
        tables.append(graph.node("Unsqueeze", table, graph.integers(axis)))
    cos, sin = tables
    first, second = graph.split(graph.reshape(operand, -1, op.heads, x.tokens, *pairs), 2, axis=axis)
    low = graph.node("Sub", graph.node("Mul", first, cos), graph.node("Mul", second, sin))
    high = graph.node("Add", graph.node("Mul", second, cos), graph.node("Mul", first, sin))
    return graph.reshape(graph.node("Concat", low, high, axis=axis), -1, op.heads, x.tokens, op.head_dim)


def _rectified(to: Builder, op: Attention, operand: str, x: Value) -> Value:
    graph, name = to.graph, f"{op.name}.{operand}_rectifier"
    if op.rectifier == "token":
        gamma, beta = to.per_head(to.array(f"{name}.gamma")), to.per_head(to.array(f"{name}.beta"))
        centred = graph.node("Sub", x, to.mean(x))
        deviation = to.root_mean_square(centred, RECTIFIER_EPS)
        return graph.node("Div", graph.node("Add", centred, beta), graph.node("Mul", gamma, deviation))
    if op.rectifier == "affine":
        factor, shift = to.per_head(to.array(f"{name}.factor")), to.per_head(to.array(f"{name}.shift"))
        return graph.node("Add", graph.node("Mul", x, factor), shift)
    return x


def _biases(to: Builder, op: Attention, x: Stream, windows: Windows | None) -> list[Value]:
    """Return what is added to the logits: values to go with ``(B, ..., H, N, N)``.

    They are computed in the graph, from much smaller tables; a runtime does it once, when it loads the model.
    """
    graph, biases = to.graph, []
    if op.bias is not None:
        rows = bias_rows(op, x)
        narrow = graph.constant(rows.astype(np.min_scalar_type(int(rows.max()))))
        table = to.tensor(f"{op.name}.relative_position_bias")
        bias = graph.node("Gather", table, graph.node("Cast", narrow, to=TensorProto.INT64))
        biases.append(graph.node("Transpose", bias, perm=[2, 0, 1]))
    if windows is not None and any(op.shift):
        regions = graph.constant(windows.regions().astype(np.int32))
        queries = graph.node("Unsqueeze", regions, graph.integers(1, 3))
        keys = graph.node("Unsqueeze", regions, graph.integers(1, 2))
        same = graph.node("Equal", queries, keys)
        biases.append(graph.node("Where", same, graph.scalar(0), graph.scalar(MASKED)))
    return biases
