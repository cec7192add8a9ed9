"""Packed models as ONNX in ONNX Runtime, in the form of an engine."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from qvit.exporting.onnx_file import onnx_model
from qvit.format.branches import Attention
from qvit.format.packed import PackedModel

onnxruntime.set_default_logger_severity(3)
OPSET = None if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24) else 21
"""ONNX Runtime has weights of 2 bits from 1.24 on, which is not made for Python 3.10."""


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a model ready to run on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OnnxEngine:
    """The checked ONNX model of a packed one; gives codes too, as :class:`qvit.runtime.engine.Engine` does."""

    def __init__(self, packed: PackedModel, *, exact: bool) -> None:
        self.program, self.instruction_set = packed.program, f"ONNX{', exact' * exact}"
        model = onnx_model(packed, exact=exact, opset=OPSET)
        onnx.checker.check_model(model, full_check=True)
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.program.bits())
        self._watched = session(model)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the outputs that go with :meth:`codes`: other outputs, other fusions."""
        return self._run(images)[0]

    def codes(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.int64]]:
        """Return the codes of every quantizer, from 0 on."""
        windows = self._in_windows()
        found = {}
        for (name, bits), stored in zip(self.program.bits().items(), self._run(images)[1:], strict=True):
            codes = stored.astype(np.int64)
            if stored.dtype == np.int8:
                codes += 2 ** (bits.activation - 1)
            if name in windows:
                codes = codes.reshape(-1, *codes.shape[2:])
            elif len(codes) != len(images):  # a constant query
                codes = np.broadcast_to(codes, (len(images), *codes.shape[1:]))
            found[name] = codes
        return found

    def _run(self, images: NDArray[np.float32]) -> list[NDArray]:
        return self._watched.run(None, {"images": images})

    def _in_windows(self) -> set[str]:
        """Return the quantizers whose codes have an axis of windows."""
        return {
            name
            for op, _ in self.program.attentions().values()
            if isinstance(op, Attention) and op.window is not None
            for name in (op.qkv.name, op.proj.name, *(name for name, _ in op.operands()))
        }
