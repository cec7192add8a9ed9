"""Products of codes in an ONNX graph, in two ways: dequantized first (QDQ), or in integers (:class:`IntegerProducts`).

A left factor is unsigned, its code 0 stored as ``2^(b-1)``; a right one is signed where :meth:`Products.signed` says
so. No PyTorch here.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from onnx import TensorProto

from qvit.exporting.onnx_graph import Graph, Value
from qvit.format.packed import PackedLayer

SATURATION = 2**15 - 1
"""Processors without VNNI add two products of an unsigned and a signed byte in 16 bits, which must hold them."""


class Codes(NamedTuple):
    """Codes in a graph.

    Attributes:
        value: of type INT8 or UINT8.
        zero: what code 0 is stored as, a constant of the same type.
    """

    value: Value
    zero: Value


class Quantized(NamedTuple):
    """What a quantizer makes of a value.

    Attributes:
        codes: for products.
        whole: the same as floats, for sums. OpenVINO 2026.4 is wrong by 2^23 where it dequantizes UINT8 for one.
    """

    codes: Codes
    whole: Value


def quantize(graph: Graph, name: str, x: Value, low: int, high: int, *, signed: bool = False) -> Quantized:
    """Return the codes ``round(clip(x, low, high))``, halves to even, as the value called ``name``.

    The rounding is an operator of its own: OpenVINO 2026.4 adds the zero point before that of QuantizeLinear, or 128,
    and the sum of floats moves what lies beside a border onto it.
    """
    whole = graph.node("Round", graph.node("Clip", x, graph.scalar(low), graph.scalar(high)))
    zero = graph.constant(np.array(0, np.int8) if signed else np.array(-low, np.uint8))
    return Quantized(Codes(graph.node("QuantizeLinear", whole, graph.scalar(1), zero, name=name), zero), whole)


class Products(Protocol):
    """How a graph multiplies codes."""

    def signed(self, left_bits: int, right_bits: int) -> bool:
        """Return whether the right factor of a product is signed."""

    def linear(self, codes: Codes, layer: PackedLayer, name: str) -> Value:
        """Return ``input_scale * scale * (Q W^T)``, ``(..., outputs)``, for codes ``(..., K)`` of a layer's inputs."""

    def matmul(self, left: Codes, right: Codes) -> Value:
        """Return the sums of products of codes ``(..., M, K)`` and ``(..., K, N)``, as floats."""


class QdqProducts:
    """Products of dequantized codes, which other tools turn into what their hardware has.

    Args:
        graph: to add to.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def signed(self, left_bits: int, right_bits: int) -> bool:
        """Return true: with unsigned weights OpenVINO 2026.4 computes less exactly."""
        return True

    def linear(self, codes: Codes, layer: PackedLayer, name: str) -> Value:
        """See :class:`Products`."""
        graph = self.graph
        x = _dequantized(graph, codes)
        weight = _weight(graph, layer, name), graph.constant(layer.input_scale * layer.scale)
        return graph.node("MatMul", x, graph.node("DequantizeLinear", *weight, axis=1))

    def matmul(self, left: Codes, right: Codes) -> Value:
        """See :class:`Products`."""
        return self.graph.node("MatMul", _dequantized(self.graph, left), _dequantized(self.graph, right))


class IntegerProducts:
    """Products in integers, exact: ``MatMulInteger``.

    Args:
        graph: to add to.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def signed(self, left_bits: int, right_bits: int) -> bool:
        """Return whether two products of an unsigned and a signed byte fit :data:`SATURATION`."""
        return 2 * (2**left_bits - 1) * 2 ** (right_bits - 1) <= SATURATION

    def linear(self, codes: Codes, layer: PackedLayer, name: str) -> Value:
        """See :class:`Products`."""
        graph = self.graph
        if self.signed(layer.bits.activation, layer.bits.weight):
            weight, zero = _weight(graph, layer, name), np.array(0, np.int8)
        else:
            unsigned = layer.codes.T.astype(np.int16) + _MIDDLE
            weight, zero = graph.constant(unsigned.astype(np.uint8), name), np.array(_MIDDLE, np.uint8)
        sums = self.matmul(codes, Codes(weight, graph.constant(zero)))
        scale = layer.input_scale.astype(np.float64) * layer.scale
        return graph.node("Mul", sums, graph.constant(scale.astype(np.float32)))

    def matmul(self, left: Codes, right: Codes) -> Value:
        """See :class:`Products`."""
        sums = self.graph.node("MatMulInteger", left.value, right.value, left.zero, right.zero)
        return self.graph.node("Cast", sums, to=TensorProto.FLOAT)


_MIDDLE = 128
"""What code 0 of an unsigned weight is stored as."""


def _dequantized(graph: Graph, codes: Codes) -> Value:
    return graph.node("DequantizeLinear", codes.value, graph.scalar(1), codes.zero)


def _weight(graph: Graph, layer: PackedLayer, name: str) -> Value:
    """Return the codes of a layer's weights, ``(inputs, outputs)``, as INT8.

    Stored in fewer bits, they are widened when a runtime loads the model: from INT4 on ONNX Runtime computes in floats.
    """
    codes = layer.codes.T
    if layer.bits.weight > 4:
        return graph.constant(codes, name)
    return graph.node("Cast", graph.narrow(name, codes, layer.bits.weight), to=TensorProto.INT8)
