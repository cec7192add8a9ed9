"""ONNX files: the reference's codes and outputs in ONNX Runtime, for every operation, family and member."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from conftest import make_vit
from family_programs import FAMILIES, shifted_program
from following import check_codes
from members import FAMILY_MEMBERS, MEMBERS, SIZES
from onnx_runs import OnnxEngine, session
from packed_models import DEIT_SMALL, make_packed, random_packed, vit_program
from programs import programs
from qvit import quantize
from qvit.config import Bits
from qvit.errors import ConfigError
from qvit.exporting import onnx_file
from qvit.exporting.onnx_file import onnx_model
from qvit.exporting.onnx_graph import Graph
from qvit.exporting.onnx_ops import BUILD
from qvit.exporting.onnx_products import IntegerProducts
from qvit.format.ops import Classify
from qvit.format.packed import write_packed
from qvit.format.program import Program
from qvit.models.families import image_size_of, lower
from qvit.runtime.reference import RUN, ReferenceEngine

CLOSE = 1e-5
"""Of the largest output."""
MODES = pytest.mark.parametrize("exact", [True, False], ids=["exact", "qdq"])


def images_for(program: Program, count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *program.input)).astype(np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


@MODES
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_reference_with_any_batch(family: str, exact: bool) -> None:
    packed = random_packed(FAMILIES[family])
    images = images_for(packed.program)
    check_codes(packed, OnnxEngine(packed, exact=exact), images)
    expected = ReferenceEngine(packed)(images)
    model = onnx_model(packed, exact=exact)
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "Round"}
    assert {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"} == rounded
    assert exact == all(node.op_type != "DequantizeLinear" for node in model.graph.node)  # OpenVINO's of UINT8 may err
    alone = session(model)  # without its codes as outputs more of it is fused
    assert_close(alone.run(None, {"images": images})[0], expected)
    assert_close(alone.run(None, {"images": images[1:2]})[0], expected[1:2])


@MODES
def test_the_mask_of_a_shifted_window_is_a_hundred(exact: bool) -> None:
    packed = random_packed(shifted_program())
    check_codes(packed, OnnxEngine(packed, exact=exact), images_for(packed.program, 2))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(program=programs(), seed=st.integers(0, 2**16), exact=st.booleans())
def test_random_programs_are_the_reference(program: Program, seed: int, exact: bool) -> None:
    packed = random_packed(program, seed)
    try:
        check_codes(packed, OnnxEngine(packed, exact=exact), images_for(program, 2, seed))
    except InvalidArgument as refusal:  # of ONNX Runtime 1.23, the last one for Python 3.10: no norm of one channel
        assume("Size of X.shape[axis:] must be larger than 1" not in str(refusal))
        raise


@pytest.mark.parametrize("member", [*MEMBERS, *FAMILY_MEMBERS])
def test_every_member_is_the_reference(member: str) -> None:
    if member in MEMBERS:
        name, options = MEMBERS[member]
        model = make_vit(name, **options)
        size = SIZES.get(member, (16, 16))
    else:
        name, options = FAMILY_MEMBERS[member]
        model = timm.create_model(name, **{"num_classes": 10, **options})
        size = image_size_of(model)
    packed = random_packed(lower(quantize(model), size)[0])
    for exact in (True, False):
        check_codes(packed, OnnxEngine(packed, exact=exact), images_for(packed.program, 2))


def test_every_operation_that_the_reference_runs_is_there() -> None:
    assert BUILD.keys() == RUN.keys()


@MODES
def test_onnxs_own_evaluator_gives_the_outputs_of_the_reference(exact: bool) -> None:
    packed = random_packed(FAMILIES["beit"])
    images = images_for(packed.program, 2)
    (found,) = ReferenceEvaluator(onnx_model(packed, exact=exact)).run(None, {"images": images})
    assert_close(found, ReferenceEngine(packed)(images))


KINDS = {
    (2, None): TensorProto.INT2,
    (2, 24): TensorProto.INT4,
    (3, None): TensorProto.INT4,
    (4, 25): TensorProto.INT4,
    (5, None): TensorProto.INT8,
    (7, None): TensorProto.INT8,
    (8, None): TensorProto.INT8,
}


@MODES
@pytest.mark.parametrize(("bits", "opset"), KINDS)
def test_weights_are_stored_in_the_narrowest_type(bits: int, opset: int | None, exact: bool) -> None:
    packed = make_packed(bits)
    model = onnx_model(packed, exact=exact, opset=opset)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith(".codes")}
    kind = TensorProto.UINT8 if exact and bits == 8 else KINDS[bits, opset]
    assert kinds == {f"{name}.codes": kind for name in packed.program.layers()}
    assert model.opset_import[0].version == (opset or (25 if bits == 2 else 21))
    if opset is None:
        check_codes(packed, OnnxEngine(packed, exact=exact), images_for(packed.program, 2))


def test_exact_products_that_two_bytes_cannot_hold_have_no_signed_factor() -> None:
    # Two products of an unsigned and a signed byte are added in 16 bits where a processor has no VNNI.
    signed = IntegerProducts(Graph(21)).signed
    for left in range(2, 9):
        for right in range(2, 9):
            assert signed(left, right) == (2 * (2**left - 1) * 2 ** (right - 1) < 2**15)
    model = onnx_model(make_packed(8), exact=True)
    assert TensorProto.INT8 not in {tensor.data_type for tensor in model.graph.initializer}


def test_activations_of_two_bits_ask_for_no_later_opset() -> None:
    bits = {**vit_program(2).bits(), **{name: Bits(4, 2) for name in vit_program(2).layers()}}
    assert onnx_model(make_packed(bits)).opset_import[0].version == 21


@pytest.mark.parametrize("bits", [2, 4])
def test_a_file_is_hardly_larger_than_the_packed_one(tmp_path: Path, bits: int) -> None:
    fields = {**DEIT_SMALL, "depth": 1, "embed_dim": 192, "num_heads": 3, "mlp_hidden": 768}
    packed = make_packed(bits, **fields)
    write_packed(tmp_path / "model.safetensors", packed)
    size = (tmp_path / "model.safetensors").stat().st_size
    for exact in (True, False):
        assert onnx_model(packed, exact=exact).ByteSize() <= 1.1 * size


def test_metadata_and_ends_say_what_goes_in_and_comes_out() -> None:
    packed = make_packed(4)
    model = onnx_model(packed)
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about == {"preprocessing": packed.preprocessing, "classes": packed.classes, "origin": packed.origin}
    runs = session(model)
    assert [(entry.name, entry.shape) for entry in runs.get_inputs()] == [("images", ["batch", 3, 8, 8])]
    assert [(entry.name, entry.shape) for entry in runs.get_outputs()] == [("logits", ["batch", 5])]
    features = session(onnx_model(random_packed(FAMILIES["features"])))
    assert [(entry.name, entry.shape) for entry in features.get_outputs()] == [("features", ["batch", 10])]


def test_names_that_a_graph_has_already_get_a_number() -> None:
    program = vit_program(4, depth=1)
    head = program.operations[-1]
    assert isinstance(head, Classify)
    for name in ("images", "logits", "constant_0", "blocks.0.attn.qkv.codes"):
        renamed = Classify((dataclasses.replace(head.heads[0], name=name),))
        packed = random_packed(Program("names", program.input, (*program.operations[:-1], renamed)))
        images = images_for(program, 2)
        model = onnx_model(packed)
        onnx.checker.check_model(model, full_check=True)
        assert_close(session(model).run(None, {"images": images})[0], ReferenceEngine(packed)(images))


@pytest.mark.parametrize("opset", [-1, 20, 26, "21", 21.0])
def test_other_opsets_are_refused(opset: Any) -> None:
    with pytest.raises(ConfigError, match=f"opset must be a whole number from 21 to 25, not {opset!r}"):
        onnx_model(make_packed(), opset=opset)


def test_a_model_that_no_onnx_file_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 10_000)
    with pytest.raises(ConfigError, match="tiny takes .* bytes, an ONNX file holds 10000 at most"):
        onnx_model(make_packed())
