"""An ONNX graph under construction: nodes, constants and names. No PyTorch here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qvit.format.codes import pack_codes

Array = NDArray[Any]
Value = str
"""Of a graph, by its name."""
FIRST_OPSET, LAST_OPSET = 21, 25
"""21 is the first with values of 4 bits, 25 with values of 2."""
_SIGN_BITS = {2: 0b10101010, 4: 0b10001000}
"""Of a byte of codes: what lies between a code plus ``2^(b-1)`` and its two's complement."""


class Graph:
    """Nodes and constants in the order they were added; equal constants are one.

    Args:
        opset: version of ONNX's operators.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._names: set[str] = set()
        self._known: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def name(self, wanted: str) -> Value:
        """Return ``wanted`` as the name of a value, with a number behind it if another value has it already."""
        name, number = wanted, 1
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def node(self, kind: str, *inputs: Value, name: str = "", **attributes: Any) -> Value:
        """Add an operator with one output and return that, called ``name`` if one is given."""
        output = self.name(name or f"{kind}_{len(self.nodes)}")
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def split(self, value: Value, parts: int, axis: int) -> list[Value]:
        """Return equal parts of a value."""
        outputs = [self.name(f"Split_{len(self.nodes)}_{part}") for part in range(parts)]
        self.nodes.append(helper.make_node("Split", [value], outputs, axis=axis, num_outputs=parts))
        return outputs

    def constant(self, array: Array, name: str = "") -> Value:
        """Return a constant."""
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._known:
            self._known[key] = self.name(name or f"constant_{len(self.constants)}")
            self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), self._known[key]))
        return self._known[key]

    def scalar(self, value: float | np.floating[Any]) -> Value:
        """Return a constant float32."""
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> Value:
        """Return a constant list, int64, as operators take axes and shapes."""
        return self.constant(np.array(values, np.int64))

    def reshape(self, value: Value, *shape: int) -> Value:
        """Return a value in another shape; -1 stands for what is left."""
        return self.node("Reshape", value, self.integers(*shape))

    def narrow(self, name: str, codes: NDArray[np.int8], bits: int) -> Value:
        """Return a constant of signed codes of 2 to 4 bits, of type INT4, or INT2 where that holds them."""
        width = 2 if bits == 2 and self.opset >= LAST_OPSET else 4
        data = pack_codes(codes.reshape(-1), width) ^ _SIGN_BITS[width]
        kind = TensorProto.INT2 if width == 2 else TensorProto.INT4
        stored = self.name(name)
        self.constants.append(TensorProto(name=stored, data_type=kind, dims=codes.shape, raw_data=data.tobytes()))
        return stored
