from __future__ import annotations

import pytest
import timm

from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.size import model_size, operations
from qvit.config import Bits

# The tiny model of conftest.py: width C, L blocks of H heads, N tokens, K classes, patches of P values, MLP ratio 4.
C, L, H, N, K, P = 24, 2, 2, 17, 10, 48
BLOCK = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
EDGES = [(C, P), (K, C)]
FLOAT32 = (
    L * (3 * C + C + 4 * C + C)  # biases of the linear layers
    + C + K  # and of the patch embedding and the head
    + (2 * L + 1) * 2 * C  # norms
    + C + N * C  # class token and position embedding
)  # fmt: skip


def numel(shapes):
    return sum(rows * columns for rows, columns in shapes)


def test_float_model(vit):
    size = model_size(vit)
    assert size.codes == size.scales == size.rectifiers == 0
    assert size.total == size.float32 == size.float_bytes == 4 * (FLOAT32 + L * numel(BLOCK) + numel(EDGES))
    assert size.total == 4 * sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize(("bits", "rectifier"), [(4, "head"), (3, "token"), (2, None)])
def test_tiny_model_by_hand(vit, bits, rectifier):
    size = model_size(quantize(vit, QuantConfig(bits, bits, rectifier=rectifier)))
    assert size.codes == L * bits * numel(BLOCK) // 8 + numel(EDGES)
    weight_scales = L * sum(rows for rows, _ in BLOCK) + sum(rows for rows, _ in EDGES)
    input_scales = 2 * (4 * L + 2)  # a scale and an offset each
    attention_scales = L * H * (3 * 2 + 1)
    assert size.scales == 4 * (weight_scales + input_scales + attention_scales)
    running = {"head": 2 * H, "token": 0, None: 0}[rectifier]
    assert size.rectifiers == (0 if rectifier is None else 4 * L * 2 * (2 * C + running))
    assert size.float32 == 4 * FLOAT32
    assert size.float_bytes == model_size(vit).total
    assert size.total == size.codes + size.scales + size.rectifiers + size.float32


def test_a_tensor_is_rounded_up_to_whole_bytes(make_model):
    model = make_model(num_classes=3)
    config = QuantConfig(4, 4, overrides={"head": (3, 4)})
    without = model_size(quantize(make_model(num_classes=0), QuantConfig(4, 4)))
    assert model_size(quantize(model, config)).codes - without.codes == 27  # 3 * 24 * 3 bits
    model = make_model(num_classes=3, embed_dim=26)
    without = model_size(quantize(make_model(num_classes=0, embed_dim=26), QuantConfig(4, 4)))
    assert model_size(quantize(model, config)).codes - without.codes == 30  # 3 * 26 * 3 = 234 bits


@pytest.mark.parametrize(("bits", "megabytes"), [(4, 12.1), (2, 6.8)])
def test_deit_small(bits, megabytes):
    size = model_size(quantize(timm.create_model("deit_small_patch16_224"), QuantConfig(bits, bits)))
    assert size.total < megabytes * 1e6
    assert size.float_bytes == 4 * 22_050_664


def by_hand(products):
    """Multiply-accumulates of the tiny model: of the blocks' linear layers, attention, and the edges."""
    linear = L * N * numel(BLOCK)
    product = L * N * N * C
    edges = (N - 1) * C * P + C * K
    return linear, products * product, edges


def test_operations_of_a_float_model(vit):
    counted = operations(vit, 16)
    assert counted.macs == {Bits(32, 32): sum(by_hand(2))}
    assert counted.total == sum(by_hand(2))
    assert counted.bit_operations == 1024 * counted.total


def test_operations_of_a_quantized_model(vit, images):
    config = QuantConfig(2, 4, overrides={"*.attn.query_quantizer": 6, "*.attn.value_quantizer": 3})
    student = quantize(vit, config)
    linear, product, edges = by_hand(1)
    expected = {Bits(2, 4): linear, Bits(4, 6): product, Bits(3, 4): product, Bits(8, 8): edges}
    counted = operations(student, (16, 16))
    assert counted.macs == expected
    assert counted.bit_operations == 8 * linear + 24 * product + 12 * product + 64 * edges
    assert counted.total == operations(vit, 16).total
    calibrate(student, [images])
    assert operations(student, 16) == counted
    assert not any(module._forward_hooks for module in student.modules())


def test_operations_of_deit_tiny():
    model = timm.create_model("deit_tiny_patch16_224")
    linear = 12 * 197 * 12 * 192 * 192
    attention = 12 * 2 * 197 * 197 * 192
    edges = 196 * 768 * 192 + 192 * 1000
    assert operations(model, 224).total == linear + attention + edges
    assert 1.08e9 < linear + attention + edges < 1.3e9


@pytest.mark.parametrize("side", [2, 4, 8])
def test_attention_in_windows_is_counted_window_by_window(side):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(2,), num_heads=(2,), window_size=side
    )
    tokens, width = 64, 8
    blocks = 2 * (tokens * 12 * width**2 + 2 * tokens * side**2 * width)
    assert operations(model, 32).total == tokens * 48 * width + blocks + width * 1000
