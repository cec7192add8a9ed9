"""The arithmetic of the reference against PyTorch, timm, the training wing and plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.models.swin_transformer import SwinTransformerBlock, window_partition

from qvit.config import Bits
from qvit.format.codes import pack_codes
from qvit.format.ops import ACTIVATIONS, Norm
from qvit.format.packed import PackedLayer
from qvit.nn.quantizer import to_codes
from qvit.nn.rectifier import TokenRectifier
from qvit.runtime import arithmetic
from qvit.runtime.arithmetic import (
    activate,
    attention_logits,
    attention_output,
    integer_matmul,
    linear_codes,
    normalize,
    quantize,
    rectify,
    relative_positions,
    rotate,
    softmax,
    window_regions,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_codes_are_those_of_the_training_wing(rng: np.random.Generator) -> None:
    x = rng.normal(0, 2, (3, 4, 50, 7)).astype(np.float32)
    scale = rng.uniform(0.1, 0.5, (4, 1, 1)).astype(np.float32)
    offset = rng.normal(size=(4, 1, 1)).astype(np.float32)
    expected = to_codes(*map(torch.from_numpy, (x, scale, offset)), -8, 7).numpy()
    codes = quantize(x, scale, offset, -8, 7)
    assert codes.dtype == np.int64
    np.testing.assert_array_equal(codes, expected)
    assert {-8, 7} <= set(codes.ravel())


def test_halves_round_to_even() -> None:
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, -100, 100], np.float32)
    codes = quantize(x, np.float32(1), np.float32(0), -8, 7)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4, -8, 7]


@pytest.mark.parametrize("k", [1, 7, 4096, 65536])
def test_integer_product_is_exact_at_the_extremes(k: int) -> None:
    a = np.array([[255] * k, [0] * k, [255, 0] * (k // 2) + [255] * (k % 2)])
    b = np.array([[-128] * k, [127] * k], np.int8)
    expected = [[sum(map(int.__mul__, row, map(int, column))) for column in b] for row in a.tolist()]
    product = integer_matmul(a, b)
    assert product.dtype == np.int64
    assert product.tolist() == expected


@pytest.mark.parametrize(("weight_bits", "input_bits"), [(2, 2), (3, 8), (4, 4), (8, 5)])
def test_linear_layer_is_the_product_of_the_values(rng: np.random.Generator, weight_bits: int, input_bits: int) -> None:
    codes = rng.integers(-(2 ** (input_bits - 1)), 2 ** (input_bits - 1), (2, 3, 11))
    weight = rng.integers(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), (5, 11))
    scale, bias = rng.normal(size=(2, 5)).astype(np.float32)
    step, offset = np.float32(0.37), np.float32(-0.81)
    layer = PackedLayer(Bits(weight_bits, input_bits), 11, pack_codes(weight, weight_bits), scale, bias, step, offset)
    x_hat = float(step) * codes + float(offset)
    w_hat = scale.astype(float)[:, None] * weight
    expected = x_hat @ w_hat.T + bias
    got = linear_codes(codes, layer)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_attention_products_are_those_of_the_values(rng: np.random.Generator) -> None:
    B, H, N, D = 2, 3, 5, 4
    q, k, v = rng.integers(-8, 8, (3, B, H, N, D))
    p = rng.integers(0, 16, (B, H, N, N))
    a_q, a_k, a_v, a_p = rng.uniform(0.1, 0.5, (4, H)).astype(np.float32)
    z_q, z_k, z_v = rng.normal(size=(3, H)).astype(np.float32)

    def value(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        return scale.astype(float)[:, None, None] * codes + offset.astype(float)[:, None, None]

    expected = value(q, a_q, z_q) @ value(k, a_k, z_k).swapaxes(-1, -2)
    np.testing.assert_allclose(attention_logits(q, k, a_q, z_q, a_k, z_k), expected, rtol=1e-12, atol=1e-12)
    expected = value(p, a_p, np.zeros(H)) @ value(v, a_v, z_v)
    np.testing.assert_allclose(attention_output(p, v, a_p, a_v, z_v), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_are_pytorchs(rng: np.random.Generator, kind: str) -> None:
    x = rng.normal(3, 2, (2, 5, 16)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 16)).astype(np.float32)
    tensors = [torch.from_numpy(values).double() for values in (x, weight, bias)]
    if kind == "layer":
        expected = F.layer_norm(tensors[0], (16,), tensors[1], tensors[2], 1e-3)
    else:
        expected = F.rms_norm(tensors[0], (16,), tensors[1], 1e-3) + tensors[2]
    got = normalize(x, Norm("norm", kind, 1e-3), weight, bias)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-6)


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_pytorchs(kind: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 999), [0.0, 1e4, -1e4]]).astype(np.float32)
    got = activate(x, kind)
    assert got.dtype == np.float32
    expected = FUNCTIONS[kind](torch.from_numpy(x).double())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-7)


def test_every_activation_of_the_format_is_computed() -> None:
    assert tuple(arithmetic.ACTIVATIONS) == ACTIVATIONS


def test_rectifier_is_the_training_wings(rng: np.random.Generator) -> None:
    x = rng.normal(1, 3, (2, 3, 5, 4)).astype(np.float32)
    gamma, beta = rng.uniform(0.5, 2, (2, 3, 4)).astype(np.float32)
    rectifier = TokenRectifier(3, 4)
    with torch.no_grad():
        rectifier.gamma.copy_(torch.from_numpy(gamma)[:, None])
        rectifier.beta.copy_(torch.from_numpy(beta)[:, None])
        expected = rectifier(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(rectify(x, gamma, beta), expected, rtol=1e-6, atol=1e-6)


def test_softmax_survives_large_logits() -> None:
    shares = softmax(np.array([[1e4, 1e4, -1e4], [0.0, math.log(3), -math.inf]]))
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0], [0.25, 0.75, 0]], rtol=1e-6)


@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize("tables", [1, 3])
def test_rotation_is_timms(rng: np.random.Generator, layout: str, tables: int) -> None:
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    angles = rng.uniform(0, 6, (tables, 5, 4))
    cos, sin = (table.astype(np.float32) for table in (np.cos(angles), np.sin(angles)))
    whole = [np.repeat(t, 2, -1) if layout == "pairs" else np.concatenate([t, t], -1) for t in (sin, cos)]
    embedding = torch.from_numpy(np.concatenate(whole, axis=-1)).double()
    expected = apply_rot_embed_cat(torch.from_numpy(x).double(), embedding, half=layout == "halves")
    got = rotate(x, cos, sin, layout)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("window", [(1, 1), (2, 3), (7, 7), (4, 1)])
def test_relative_positions_are_timms(window: tuple[int, int], prefix: bool) -> None:
    expected = gen_relative_position_index(window, class_token=prefix)
    np.testing.assert_array_equal(relative_positions(window, prefix), expected.numpy())


@pytest.mark.parametrize("shift", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("grid", [(8, 12), (4, 6), (12, 3)])
def test_parts_of_a_shifted_window_are_timms(grid: tuple[int, int], shift: tuple[int, int]) -> None:
    window = 4, 3
    block = SwinTransformerBlock(4, grid, num_heads=1, window_size=window, always_partition=True)
    block.shift_size = shift
    masked = block.get_attn_mask().numpy() != 0
    regions = torch.from_numpy(window_regions(grid, window, shift)).view(1, *grid, 1)
    parts = window_partition(regions, window).view(-1, window[0] * window[1]).numpy()
    np.testing.assert_array_equal(parts[:, :, None] != parts[:, None, :], masked)


@pytest.mark.parametrize(("shift", "parts"), [((0, 0), 1), ((0, 2), 3), ((2, 0), 3), ((1, 2), 9)])
def test_an_axis_that_is_not_shifted_has_no_parts(shift: tuple[int, int], parts: int) -> None:
    assert len(np.unique(window_regions((8, 9), (4, 3), shift))) == parts
