"""The parts that operations share, as nodes of an ONNX graph: layers, operands, norms, activation functions.

No PyTorch here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qvit.exporting.onnx_graph import Array, Graph, Value
from qvit.exporting.onnx_products import Products, Quantized, quantize
from qvit.format.ops import Layer, Norm
from qvit.format.packed import PackedModel
from qvit.runtime.arithmetic import signed_range


class Builder:
    """What turns operations of a packed model into nodes.

    Args:
        packed: the model.
        graph: to add to.
        products: how codes are multiplied.
    """

    def __init__(self, packed: PackedModel, graph: Graph, products: Products) -> None:
        self.packed, self.graph, self.products = packed, graph, products

    def array(self, name: str) -> Array:
        """Return a tensor of the packed model."""
        return self.packed.tensors[name]

    def tensor(self, name: str) -> Value:
        """Return a tensor of the packed model as a constant."""
        return self.graph.constant(self.array(name), name)

    def layer(self, layer: Layer, x: Value) -> Value:
        """Return a linear layer's outputs for ``x (..., inputs)``, which becomes codes first."""
        graph, parts = self.graph, self.packed.layer(layer)
        if parts.input_offset:
            x = graph.node("Sub", x, graph.scalar(parts.input_offset))
        x = graph.node("Div", x, graph.scalar(parts.input_scale))
        codes = quantize(graph, layer.name, x, *signed_range(layer.bits.activation)).codes
        product = self.products.linear(codes, parts, f"{layer.name}.codes")
        rows = parts.codes.sum(axis=1, dtype=np.int64)
        constant = float(parts.input_offset) * parts.scale.astype(np.float64) * rows + parts.bias
        return graph.node("Add", product, graph.constant(constant.astype(np.float32)))

    def operand(self, name: str, bits: int, x: Value, *, signed: bool = False) -> Quantized:
        """Return the codes of one operand ``(..., H, N, D)`` of the attention products; scales are per head."""
        graph, (low, high) = self.graph, (0, 2**bits - 1)
        if f"{name}.offset" in self.packed.tensors:
            x = graph.node("Sub", x, self.per_head(self.array(f"{name}.offset")))
            low, high = signed_range(bits)
        x = graph.node("Div", x, self.per_head(self.array(f"{name}.scale")))
        return quantize(graph, name, x, low, high, signed=signed)

    def per_head(self, values: Array) -> Value:
        """Return a constant float32 per head or per head and channel, to go with ``(..., H, N, D)``."""
        shape = (len(values), 1, values.shape[-1] if values.ndim > 1 else 1)
        return self.graph.constant(values.astype(np.float32).reshape(shape))

    def norm(self, norm: Norm | None, x: Value) -> Value:
        """Return ``x (..., width)`` normalised."""
        if norm is None:
            return x
        weight, bias = self.tensor(f"{norm.name}.weight"), self.tensor(f"{norm.name}.bias")
        if norm.kind == "layer":
            return self.graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)
        return self._affine(self._over_root_mean_square(x, norm.eps), weight, bias)

    def head_norm(self, norm: Norm | None, x: Value) -> Value:
        """Return ``x (..., H, N, D)`` normalised, each head with weights of its own."""
        if norm is None:
            return x
        weight, bias = self.array(f"{norm.name}.weight"), self.array(f"{norm.name}.bias")
        if norm.kind == "layer":
            x = self.graph.node("Sub", x, self.mean(x))
        return self._affine(self._over_root_mean_square(x, norm.eps), self.per_head(weight), self.per_head(bias))

    def mean(self, x: Value, axis: int = -1) -> Value:
        """Return the mean over an axis, which stays with length 1."""
        return self.graph.node("ReduceMean", x, self.graph.integers(axis))

    def root_mean_square(self, x: Value, eps: float) -> Value:
        """Return the root of the mean square over the last dimension, ``eps`` added under it."""
        graph = self.graph
        square = self.mean(graph.node("Mul", x, x))
        return graph.node("Sqrt", graph.node("Add", square, graph.scalar(eps)))

    def activate(self, x: Value, kind: str) -> Value:
        """Return the activation function called ``kind``, one of :data:`qvit.format.ops.ACTIVATIONS`."""
        return ACTIVATIONS[kind](self.graph, x)

    def _over_root_mean_square(self, x: Value, eps: float) -> Value:
        return self.graph.node("Div", x, self.root_mean_square(x, eps))

    def _affine(self, x: Value, weight: Value, bias: Value) -> Value:
        return self.graph.node("Add", self.graph.node("Mul", x, weight), bias)


def _times_sigmoid(graph: Graph, x: Value, factor: float) -> Value:
    inner = x if factor == 1 else graph.node("Mul", x, graph.scalar(factor))
    return graph.node("Mul", x, graph.node("Sigmoid", inner))


ACTIVATIONS: dict[str, Callable[[Graph, Value], Value]] = {
    "gelu": lambda graph, x: graph.node("Gelu", x),
    "gelu_tanh": lambda graph, x: graph.node("Gelu", x, approximate="tanh"),
    "quick_gelu": lambda graph, x: _times_sigmoid(graph, x, 1.702),
    "silu": lambda graph, x: _times_sigmoid(graph, x, 1),
    "relu": lambda graph, x: graph.node("Relu", x),
}
