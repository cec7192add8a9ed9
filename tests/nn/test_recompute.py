"""What the backward pass computes again: the same gradients, of fewer bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.config import Bits
from qvit.nn.attention import QuantSelfAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer, fake_quantize
from qvit.nn.recompute import recomputed

# About as many tokens as channels, as in DeiT-T: the attention map has the share of a step's memory that it has there.
LIKE_DEIT = {"img_size": 28, "patch_size": 4, "embed_dim": 48, "num_heads": 3, "depth": 2}


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Return the bytes of all that ``step`` keeps for a backward pass, parameters left out, each storage once."""
    storages: dict[int, Any] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = step()
    del kept
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("rectifier", "compiled"), [("head", False), ("token", False), (None, False), ("head", True)])
def test_a_students_step_keeps_at_most_a_quarter_more_than_a_float_step(make_model, rectifier, compiled: bool) -> None:
    teacher = make_model(**{**LIKE_DEIT, "depth": 1 if compiled else 2})
    x = torch.randn(4, 3, 28, 28)
    student = quantize(teacher, QuantConfig(rectifier=rectifier))
    calibrate(student, [x])
    student.train()
    teacher.train()
    float_bytes = saved_bytes(teacher, lambda: teacher(x))
    if compiled:
        if torch.__version__ < (2, 12):
            pytest.skip("what PyTorch 2.11 compiles keeps more")
        torch._dynamo.reset()
        student.compile(fullgraph=True, backend="aot_eager_decomp_partition")  # with the partitioner of inductor
    student_bytes = saved_bytes(student, lambda: student(x))
    # Blocks, images, tokens, channels, bytes, tensors a block
    assert float_bytes > len(teacher.blocks) * 4 * 50 * 48 * 4 * 10
    assert student_bytes <= 1.25 * float_bytes


def calibrated(module: nn.Module) -> nn.Module:
    """Return ``module`` in float64 with scales that clip some values."""
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            largest = 0.3 if quantizer.low == 0 else 0.5  # of the attention map, and of all else
            quantizer.set(torch.empty_like(quantizer.log_scale).uniform_(0.8, 1.2) * largest / quantizer.high)
            if quantizer.offset is not None:
                nn.init.uniform_(quantizer.offset, -0.1, 0.1)
    module.double()
    return module


def quantized(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return what ``quantizer`` is to make of ``x``."""
    shared = (x[0] if quantizer.batched else x).numel() / quantizer.log_scale.numel()
    g = 1 / math.sqrt(shared * quantizer.high)
    return fake_quantize(x, quantizer.scale, quantizer.offset, quantizer.low, quantizer.high, g)


def plain_linear(layer: QuantLinear, x: Tensor) -> Tensor:
    return F.linear(quantized(layer.input_quantizer, x), quantized(layer.weight_quantizer, layer.weight), layer.bias)


def plain_convolution(layer: QuantConv2d, x: Tensor) -> Tensor:
    weight = quantized(layer.weight_quantizer, layer.weight)
    return F.conv2d(quantized(layer.input_quantizer, x), weight, layer.bias, layer.stride, layer.padding)


def plain_attention(layer: QuantSelfAttention, x: Tensor) -> Tensor:
    def rectified(rectifier: Any, q: Tensor) -> Tensor:
        mean, variance = q.mean((0, 2, 3), keepdim=True), q.var((0, 2, 3), unbiased=False, keepdim=True)
        return (q - mean + rectifier.beta) / (rectifier.gamma * (variance + 1e-6).sqrt())

    B, N, C = x.shape
    q, k, v = plain_linear(layer.qkv, x).reshape(B, N, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q = quantized(layer.query_quantizer, rectified(layer.query_rectifier, q))
    k = quantized(layer.key_quantizer, rectified(layer.key_rectifier, k))
    attention = quantized(layer.attention_quantizer, (q @ k.transpose(-2, -1) * layer.scale).softmax(dim=-1))
    out = attention @ quantized(layer.value_quantizer, v)
    return plain_linear(layer.proj, out.transpose(1, 2).reshape(B, N, C))


def make_attention() -> QuantSelfAttention:
    layer = QuantSelfAttention(Attention(24, 2, qkv_bias=True), QuantConfig(), "attn")
    layer.qkv, layer.proj = QuantLinear(layer.qkv, Bits(4, 4)), QuantLinear(layer.proj, Bits(4, 4))
    return layer


LAYERS = {
    "linear": (lambda: QuantLinear(nn.Linear(24, 10), Bits(4, 4)), plain_linear, (3, 7, 24)),
    "patches": (lambda: QuantConv2d(nn.Conv2d(3, 10, 4, 4), Bits(8, 8)), plain_convolution, (2, 3, 13, 12)),
    "oblong": (lambda: QuantConv2d(nn.Conv2d(3, 10, (2, 4), (2, 4)), Bits(8, 8)), plain_convolution, (2, 3, 8, 12)),
    "overlapping": (lambda: QuantConv2d(nn.Conv2d(3, 10, 4, 2, 1), Bits(8, 8)), plain_convolution, (2, 3, 8, 12)),
    "attention": (make_attention, plain_attention, (3, 7, 24)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_every_gradient_are_those_of_the_plain_formula(kind: str) -> None:
    make, plain, shape = LAYERS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    layer = calibrated(make()).train()
    results = []
    for forward in (layer, lambda x: plain(layer, x)):
        leaf = x.clone().requires_grad_(True)
        layer.zero_grad()
        out = forward(leaf)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        results.append({"output": out.detach(), "input": leaf.grad, **gradients})
    got, expected = results
    assert len(got) > 5
    for name, value in expected.items():
        assert bool(value.any()) or name.endswith("offset"), name  # where nothing is clipped
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_dropout_is_the_same_when_it_is_computed_again() -> None:
    x = torch.ones(1000, requires_grad=True)
    # the square keeps the dropped values for its own gradient, so they are computed again
    y = recomputed(lambda x: F.dropout(x, 0.5).square(), x, random=True)
    torch.rand(3)  # the generator has moved on
    y.sum().backward()
    assert 300 < int((y == 0).sum()) < 700
    torch.testing.assert_close(x.grad, 2 * y)


def test_attention_with_dropout_computes_the_dropped_map_again(make_model, images: Tensor) -> None:
    student = quantize(make_model(attn_drop_rate=0.5), QuantConfig(8, 8, rectifier=None))
    calibrate(student, [images])
    attention = student.train().blocks[0].attn
    x = torch.randn(2, 17, 24)
    gradients = []
    for disturbed in (False, True):
        attention.zero_grad()
        torch.manual_seed(3)
        out = attention(x)
        if disturbed:
            torch.rand(7)
        out.square().sum().backward()
        gradients.append(attention.qkv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_nothing_is_kept_where_no_gradient_is_asked_for(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit)
    calibrate(student, [images])
    with torch.no_grad():
        expected = student(images)
    torch.testing.assert_close(student(images).detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["timm", "reentrant", "compiled"])
def test_gradient_checkpointing_counts_nothing_twice(make_model, images: Tensor, labels: Tensor, way: str) -> None:
    vit = make_model(depth=1)
    plain = quantize(vit)
    calibrate(plain, [images])
    saving = copy.deepcopy(plain)
    if way == "reentrant":
        for block in saving.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    else:
        saving.set_grad_checkpointing()
    if way == "compiled":
        torch.compiler.reset()
        saving.compile(backend="aot_eager")
    loss_fn = DistillationLoss(vit, guided=way != "reentrant")  # which keeps no gradient of what is inside
    for model in (plain, saving):
        for step in range(2):
            loss_fn(model, images + step, labels).backward()
    for (name, value), other in zip(saving.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    for (name, value), other in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
