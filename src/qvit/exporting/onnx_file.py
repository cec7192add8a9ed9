"""A packed model as an ONNX file, for other runtimes (docs/onnx.md). No PyTorch here."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from qvit._version import __version__
from qvit.config import check_count
from qvit.errors import ConfigError
from qvit.exporting.onnx_builder import Builder
from qvit.exporting.onnx_graph import FIRST_OPSET, LAST_OPSET, Graph
from qvit.exporting.onnx_ops import BUILD
from qvit.exporting.onnx_products import IntegerProducts, QdqProducts
from qvit.files import check_absent, write_atomically
from qvit.format.packed import PackedModel, Source, read_packed

LARGEST = 2**31 - 1
"""Bytes of an ONNX file."""
IMAGES = "images"
"""The input: float32, ``(batch, C, H, W)``, preprocessed."""


def export_onnx(
    source: Source, path: str | Path, *, exact: bool = False, opset: int | None = None, replace: bool = False
) -> None:
    """Write a packed model as an ONNX file.

    Args:
        source: of the packed model, as :func:`qvit.format.packed.read_packed` takes it.
        path: file to write.
        exact: as :func:`onnx_model`.
        opset: as :func:`onnx_model`.
        replace: whether a file at ``path`` may be replaced, once the new one is complete.

    Raises:
        PackedFileError: if the packed model cannot be read.
        ConfigError: as :func:`onnx_model`, or if something is at ``path``.
        OutputError: if the file cannot be written.
    """
    if not replace:
        check_absent(path, "replace=True")
    data = onnx_model(read_packed(source), exact=exact, opset=opset).SerializeToString()
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))


def onnx_model(packed: PackedModel, *, exact: bool = False, opset: int | None = None) -> onnx.ModelProto:
    """Return a packed model as an ONNX model of one input, ``images``, and one output, ``logits`` or ``features``.

    The codes of a quantizer are the value that is called as the quantizer is in the file.

    Args:
        packed: the model.
        exact: whether products of codes are in integers (``MatMulInteger``), or of dequantized codes (QDQ).
        opset: version of ONNX's operators; by default 21, or 25 if weights have 2 bits.

    Raises:
        ConfigError: for another opset than 21 to 25, and for a model that is too large.
    """
    if opset is None:
        opset = _narrowest(packed)
    check_count("opset", opset, FIRST_OPSET, LAST_OPSET)
    program, graph = packed.program, Graph(opset)
    opsets = [helper.make_opsetid("", opset)]
    images, result = graph.name(IMAGES), graph.name("logits" if program.classifies else "features")
    to = Builder(packed, graph, IntegerProducts(graph) if exact else QdqProducts(graph))
    value = images
    for operation, x in program.walk():
        value = BUILD[type(operation)](to, operation, x, value)
    graph.nodes.append(helper.make_node("Reshape", [value, graph.integers(-1, program.output)], [result]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            program.name,
            [helper.make_tensor_value_info(images, TensorProto.FLOAT, ["batch", *program.input])],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["batch", program.output])],
            graph.constants,
        ),
        producer_name="qvit",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    about = {"preprocessing": packed.preprocessing, "classes": packed.classes, "origin": packed.origin}
    helper.set_model_props(model, {name: json.dumps(data, ensure_ascii=False) for name, data in about.items()})
    if model.ByteSize() > LARGEST:
        raise ConfigError(f"{program.name} takes {model.ByteSize()} bytes, an ONNX file holds {LARGEST} at most.")
    return model


def _narrowest(packed: PackedModel) -> int:
    """Return the opset whose types hold the weights in the fewest bits."""
    narrow = any(layer.bits.weight == 2 for layer in packed.program.layers().values())
    return LAST_OPSET if narrow else FIRST_OPSET
