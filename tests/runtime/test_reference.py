"""The reference's operations: against timm where timm has them, and as a whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import nn

from family_programs import FAMILIES, attention, layer
from packed_models import make_packed, random_packed, vit_program
from qvit.config import Bits
from qvit.errors import DataError
from qvit.format.branches import Attention
from qvit.format.ops import Merge, Norm, Stream
from qvit.runtime.reference import RUN, ReferenceEngine


def test_watch_sees_every_quantizer_within_its_bits() -> None:
    fields = {"rectifier": "token", "pool": "avgmax", "pool_skip": 1}
    bits = {**vit_program(3, **fields).bits(), "blocks.1.attn.map": Bits(2, 2)}
    model = make_packed(bits, **fields)
    seen: dict[str, np.ndarray] = {}
    images = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    logits = ReferenceEngine(model, seen.__setitem__)(images)
    assert logits.shape == (2, 5)
    assert logits.dtype == np.float32
    assert seen.keys() == bits.keys() == model.program.bits().keys()
    assert seen["blocks.0.attn.query"].shape == (2, 2, 5, 4)
    assert seen["patch_embed.proj"].shape == (2, 4, 48)
    assert seen["blocks.1.attn.map"].max() <= 3
    assert seen["blocks.1.attn.map"].min() >= 0
    assert all(np.abs(codes).max() <= 7 for codes in seen.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_do_not_touch_each_other(family: str) -> None:
    program = FAMILIES[family]
    engine = ReferenceEngine(random_packed(program))
    images = np.random.default_rng(1).normal(size=(3, *program.input)).astype(np.float32)
    together = engine(images)
    np.testing.assert_array_equal(together, np.concatenate([engine(image[None]) for image in images]))
    assert np.abs(together[0] - together[1]).max() > 1e-3
    assert engine(images[:0]).shape == (0, program.output)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 9), (1, 1, 8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"takes images of shape \(B, 3, 8, 8\)"):
        ReferenceEngine(make_packed())(np.zeros(shape, np.float32))


def test_images_that_are_not_numbers_are_refused() -> None:
    images = np.zeros((1, 3, 8, 8), np.float32)
    images[0, 1, 2, 3] = np.nan
    with pytest.raises(DataError, match="NaN or an infinity"):
        ReferenceEngine(make_packed())(images)


GRID, WIDTH = (8, 6), 6


class Floats(ReferenceEngine):
    """The reference with its products in floating point, to compare its order of things with timm's."""

    def __init__(self, tensors: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
        super().__init__(SimpleNamespace(program=None, tensors=tensors))  # type: ignore[arg-type]
        self.weights = weights

    def layer(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.weights[layer.name].T

    def products(self, op: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        logits = q @ k.swapaxes(-1, -2) * op.scale + (0 if bias is None else bias)
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (1, 2), (3, 1)])
def test_shifted_windows_are_timms(shift: tuple[int, int]) -> None:
    window, heads, rng = (4, 3), 2, np.random.default_rng(0)
    block = SwinTransformerBlock(WIDTH, GRID, heads, window_size=window, qkv_bias=False, always_partition=True).double()
    block.shift_size = shift
    block.attn_mask = block.get_attn_mask()
    table, qkv, proj = block.attn.relative_position_bias_table, block.attn.qkv.weight, block.attn.proj.weight
    for parameter in (table, qkv, proj):
        nn.init.normal_(parameter)
    nn.init.zeros_(block.attn.proj.bias)
    fields = {"window": window, "shift": shift, "bias": "relative_position", "norm": None}
    op = attention("attn", WIDTH, heads, **fields)
    weights = {"attn.qkv": qkv.detach().numpy(), "attn.proj": proj.detach().numpy()}
    engine = Floats({"attn.relative_position_bias": table.detach().numpy()}, weights)
    values = rng.normal(size=(2, 48, WIDTH))
    got = RUN[Attention](engine, op, Stream("tokens", 48, WIDTH, GRID), values)
    with torch.no_grad():
        expected = block._attn(torch.from_numpy(values).view(2, *GRID, WIDTH)).reshape(2, 48, WIDTH)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_merging_is_timms() -> None:
    merging, rng = PatchMerging(WIDTH, 5, norm_layer=nn.LayerNorm), np.random.default_rng(0)
    for parameter in merging.parameters():
        nn.init.normal_(parameter)
    tensors = {f"norm.{name}": getattr(merging.norm, name).detach().numpy() for name in ("weight", "bias")}
    engine = Floats(tensors, {"reduction": merging.reduction.weight.detach().numpy()})
    op = Merge(layer("reduction", 4 * WIDTH, 5), Norm("norm", "layer", merging.norm.eps))
    values = rng.normal(size=(2, 48, WIDTH)).astype(np.float32)
    got = RUN[Merge](engine, op, Stream("tokens", 48, WIDTH, GRID), values)
    with torch.no_grad():
        expected = merging(torch.from_numpy(values).view(2, *GRID, WIDTH)).reshape(2, 12, 5)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
