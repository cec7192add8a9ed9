from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import Tensor, nn

import members
from members import DISTILLED, VIT
from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.errors import UnsupportedModelError
from qvit.nn.attention import QuantAttention, QuantSelfAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectifier import Rectifier

MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (VIT, {}),
    "no_classes": (VIT, {"num_classes": 0}),
    **{
        name: members.MEMBERS[name]
        for name in (
            "deit", "distilled", "average_pool", "layer_scale", "qk_norm", "register_tokens", "no_class_token",
            "not_square", "dynamic_size", "swiglu", "packed_swiglu", "pre_norm", "post_norm", "parallel",
            "attention_norm", "one_head", "no_bias",
        )
    },
}  # fmt: skip


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest, make_model) -> tuple[nn.Module, Tensor]:
    name, kwargs = MEMBERS[request.param]
    return make_model(name, **kwargs), torch.randn(16, 3, *members.SIZES.get(request.param, (16, 16)))


def student_of(teacher: nn.Module, images: Tensor, *args: Any, **kwargs: Any) -> nn.Module:
    student = quantize(teacher, QuantConfig(*args, **kwargs))
    calibrate(student, [images])
    return student.eval()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_member_keeps_timms_module_names_and_loads_its_state_dict(member) -> None:
    teacher, _ = member
    student = quantize(teacher)
    names, timms = ({name for name, _ in model.named_modules()} for model in (student, teacher))
    assert timms <= names
    assert {name.rpartition(".")[2] for name in names - timms} == {
        *(f"{part}_quantizer" for part in ("input", "weight", "query", "key", "value", "attention")),
        "query_rectifier",
        "key_rectifier",
    }
    other = {key: torch.randn_like(value) for key, value in teacher.state_dict().items()}
    student.load_state_dict(other, strict=True)
    assert all(torch.equal(student.state_dict()[key], value) for key, value in other.items())


def test_member_has_every_linear_layer_convolution_and_attention_quantized(member) -> None:
    teacher, _ = member
    student = quantize(teacher)
    replaced = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d, Attention: QuantSelfAttention}
    checked = 0
    for name, module in teacher.named_modules():
        if type(module) in replaced:
            assert type(student.get_submodule(name)) is replaced[type(module)], name
            checked += 1
    assert checked >= 1 + 5 * 2  # the patch embedding, and five a block


def test_member_at_eight_bits_is_close_to_the_float_model(member, request: pytest.FixtureRequest) -> None:
    teacher, images = member
    student = student_of(teacher, images, 8, 8)
    with torch.no_grad():
        expected, got = teacher(images), student(images)
    assert got.shape == expected.shape
    # a LayerNorm behind every branch magnifies what quantization does to a small one
    assert relative_error(got, expected) < (0.25 if "post_norm" in request.node.name else 0.08)


def test_member_feeds_both_attention_products_with_codes(member) -> None:
    teacher, images = member
    student = student_of(teacher, images, 3, 3)
    seen: dict[str, Tensor] = {}
    for name, module in student.named_modules():
        if isinstance(module, Quantizer) and name.split(".")[-2] == "attn":
            module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out.detach()))
    student(images)
    attentions = [m for m in student.modules() if isinstance(m, QuantAttention)]
    assert len(seen) == 4 * len(attentions) >= 8
    for name, out in seen.items():
        for head in out.unbind(1):
            assert 1 < head.unique().numel() <= 2**3, name
    assert all(seen[name].min() >= 0 for name in seen if name.endswith("attention_quantizer"))


def test_member_output_depends_on_the_codes_alone(member) -> None:
    """Both products really use what the four quantizers return: each of them, zeroed, changes the output."""
    teacher, images = member
    student = student_of(teacher, images)
    with torch.no_grad():
        before = student(images)
        attention = next(m for m in student.modules() if isinstance(m, QuantAttention))
        for operand in ("query", "key", "value", "attention"):
            quantizer = getattr(attention, f"{operand}_quantizer")
            handle = quantizer.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            assert not torch.equal(student(images), before), operand
            handle.remove()
        assert torch.equal(student(images), before)


def test_member_trains_a_step_with_a_gradient_for_every_parameter_that_the_float_model_has(member) -> None:
    teacher, images = member
    student = student_of(teacher, images, 4, 4).train()
    out = student(images)
    out.square().mean().backward()
    teacher.train()(images).square().mean().backward()
    without = {name for name, p in teacher.named_parameters() if p.grad is None}
    for name, parameter in student.named_parameters():
        if name in without:
            continue
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_no_fused_attention_runs_in_a_student(vit: nn.Module, images: Tensor, monkeypatch) -> None:
    student = student_of(vit, images)

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("scaled_dot_product_attention was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    with pytest.raises(AssertionError, match="was called"):
        vit(images)
    assert bool(torch.isfinite(student(images)).all())


@pytest.mark.parametrize("masking", ["boolean", "additive", "causal"])
def test_attention_masks_mean_what_they_mean_in_timm(vit: nn.Module, images: Tensor, masking: str) -> None:
    student = student_of(vit, images, 8, 8)
    x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(images)))
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    arguments = {
        "boolean": {"attn_mask": mask},
        "additive": {"attn_mask": torch.zeros(17, 17).masked_fill(~mask, -torch.inf)},
        "causal": {"is_causal": True},
    }[masking]
    with torch.no_grad():
        expected = vit.blocks[0].attn(x, **arguments)
        assert relative_error(vit.blocks[0].attn(x), expected) > 0.2
        assert relative_error(student.blocks[0].attn(x, **arguments), expected) < 0.05


def test_bits_of_every_layer_are_those_of_the_config(make_model) -> None:
    config = QuantConfig(3, 5, overrides={"blocks.1.*": (2, 6), "blocks.*.mlp.fc2": 7, "*.value_quantizer": 8})
    student = quantize(make_model(DISTILLED), config)
    expected = {
        "patch_embed.proj": (8, 8),
        "head": (8, 8),
        "head_dist": (8, 8),
        "blocks.0.attn.qkv": (3, 5),
        "blocks.0.mlp.fc2": (7, 7),
        "blocks.1.attn.proj": (2, 6),
        "blocks.1.mlp.fc2": (7, 7),
    }
    for name, (weight, activation) in expected.items():
        module = student.get_submodule(name)
        assert (module.weight_quantizer.bits, module.input_quantizer.bits) == (weight, activation), name
    attention = student.blocks[1].attn
    assert (attention.query_quantizer.bits, attention.attention_quantizer.bits, attention.value_quantizer.bits) == (
        6,
        6,
        8,
    )


def test_print_tells_the_bits_of_every_layer(vit: nn.Module) -> None:
    text = repr(quantize(vit, QuantConfig(3, 5)))
    lines = text.splitlines()
    for layer in ("(qkv)", "(proj): QuantLinear", "(fc1)", "(fc2)"):
        found = [i for i, line in enumerate(lines) if layer in line]
        assert len(found) == 2
        assert all("bias=True, weight_bits=3, activation_bits=5" in lines[i + 1] for i in found)
    assert any("(query_quantizer): Quantizer(5 bits, signed, scales=2" in line for line in lines)
    assert any("(attention_quantizer): Quantizer(5 bits, unsigned, scales=2" in line for line in lines)
    assert "3, 24, kernel_size=(4, 4), stride=(4, 4), weight_bits=8, activation_bits=8" in text
    assert "in_features=24, out_features=10, bias=True, weight_bits=8, activation_bits=8" in text


def test_weights_have_a_scale_an_output_channel_and_activations_one_a_tensor_or_head(vit: nn.Module) -> None:
    student = quantize(vit)
    block = student.blocks[0]
    assert block.attn.qkv.weight_quantizer.scale.shape == (72, 1)
    assert block.attn.qkv.input_quantizer.scale.shape == ()
    assert block.attn.query_quantizer.scale.shape == (2, 1, 1)
    assert student.patch_embed.proj.weight_quantizer.scale.shape == (24, 1, 1, 1)
    assert block.attn.qkv.weight_quantizer.offset is None
    assert block.attn.attention_quantizer.offset is None


def test_linear_layer_is_an_integer_product_between_two_affine_steps(vit: nn.Module, images: Tensor) -> None:
    layer = student_of(vit, images, 4, 4).blocks[0].mlp.fc1
    x = torch.randn(5, 24)
    a, w = layer.input_quantizer, layer.weight_quantizer
    product = (a.codes(x).long() @ w.codes(layer.weight).long().T).double()
    rows = w.codes(layer.weight).double().sum(dim=1)
    alpha, alpha_w, z = a.scale.double(), w.scale.double().flatten(), a.offset.double()
    expected = alpha * alpha_w * product + z * alpha_w * rows + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_rectifiers_follow_the_config(vit: nn.Module, rectifier) -> None:
    student = quantize(vit, QuantConfig(rectifier=rectifier))
    assert sum(isinstance(m, Rectifier) for m in student.modules()) == (0 if rectifier is None else 4)


def test_dynamic_image_sizes_run_without_new_calibration(make_model, images: Tensor) -> None:
    teacher = make_model(dynamic_img_size=True)
    student = student_of(teacher, images, 8, 8)
    larger = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        assert relative_error(student(larger), teacher(larger)) < 0.1


# --- refusals ---------------------------------------------------------------------------------------------------------


class OwnAttention(nn.Module):
    """No parameters of its own: only the place where it stands tells that it is an attention."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


class OwnForward(Attention):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(x)


class OwnBlock(nn.Module):
    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)


class Gated(Block):
    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.attn = Attention(dim, num_heads, gated=True)


class OddLinear(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, in_features))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"block_fn": ParallelScalingBlock}, r"blocks\.0 \(ParallelScalingBlock\)"),
        ({"global_pool": "map"}, r"attn_pool \(QuantAttentionPool\): .* before the patches"),
        ({"attn_layer": "diff"}, r"blocks\.0\.attn \(DiffAttention\)"),
        ({"attn_layer": OwnAttention}, r"blocks\.0\.attn \(OwnAttention\)"),
        ({"attn_layer": OwnForward}, r"blocks\.0\.attn \(OwnForward\)"),
        ({"block_fn": OwnBlock}, r"blocks\.0 \(OwnBlock\)"),
        ({"block_fn": Gated}, r"blocks\.0\.attn \(Attention\): gated"),
        ({"mlp_layer": OddLinear}, r"blocks\.0\.mlp \(OddLinear\)"),
    ],
)
def test_unsupported_member_is_refused_by_module_name_and_class(make_model, kwargs: dict[str, Any], named: str) -> None:
    teacher = make_model(**kwargs)
    types = [type(m) for m in teacher.modules()]
    with pytest.raises(UnsupportedModelError, match=named):
        quantize(teacher)
    assert [type(m) for m in teacher.modules()] == types


def test_hybrid_patch_embedding_is_refused_by_module_name_and_class() -> None:
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match=r"patch_embed \(HybridEmbed\)"):
        quantize(hybrid)


def test_other_networks_are_refused_by_class() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"the model \(ResNet\): it is a model and not timm's; .*\(VisionTransformer,"
    ):
        quantize(timm.create_model("resnet10t"))


def test_model_that_is_quantized_already_is_refused(vit: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="Cannot quantize"):
        quantize(quantize(vit))


# --- copies, precision, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_deepcopy_of_a_calibrated_student_gives_equal_logits(vit: nn.Module, images: Tensor, rectifier) -> None:
    student = student_of(vit, images, rectifier=rectifier)
    other = copy.deepcopy(student)
    assert torch.equal(other(images), student(images))
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.add_(1.0)
    assert not torch.equal(other(images), student(images))


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_state_dict_of_a_calibrated_student_makes_another_one_run(vit: nn.Module, images: Tensor, rectifier) -> None:
    student = student_of(vit, images, rectifier=rectifier)
    other = quantize(vit, QuantConfig(rectifier=rectifier))
    other.load_state_dict(student.state_dict())
    other.eval()
    assert torch.equal(other(images), student(images))


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_autocast_bfloat16_trains_and_keeps_scales_float32(vit: nn.Module, images, labels, rectifier) -> None:
    student = student_of(vit, images, rectifier=rectifier).train()
    loss_fn = DistillationLoss(vit)
    expected = loss_fn(copy.deepcopy(student), images, labels).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(student, images, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.1)
    quantizer_parameters = {n: p for n, p in student.named_parameters() if "quantizer" in n or "rectifier" in n}
    assert len(quantizer_parameters) > 20
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all())
        for p in quantizer_parameters.values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moved_student_keeps_its_scales_and_still_runs(vit: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    student = student_of(vit, images, 8, 8)
    with torch.no_grad():
        expected = student(images)
        scales = [m.scale for m in student.modules() if isinstance(m, Quantizer)]
        student.to(dtype)
        got = student(images.to(dtype))
    assert got.dtype == dtype
    assert all(
        torch.equal(scale, m.scale)
        for scale, m in zip(scales, (m for m in student.modules() if isinstance(m, Quantizer)), strict=True)
    )
    assert relative_error(got.double(), expected.double()) < 0.1


BACKEND = "aot_eager"  # traces forward and backward as inductor does, without the minute of C++ compilation


def test_compiled_student_equals_eager_without_graph_breaks(make_model, images: Tensor) -> None:
    student = student_of(make_model(depth=1), images, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend=BACKEND)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), student(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("way", "rectifier"), [("in_place", "head"), ("wrapped", "token")])
def test_training_step_with_a_compiled_student_equals_eager(make_model, images, labels, way: str, rectifier) -> None:
    vit = make_model(depth=1)
    student = student_of(vit, images, rectifier=rectifier).train()
    eager = copy.deepcopy(student)
    loss_fn = DistillationLoss(vit)
    expected = loss_fn(eager, images, labels)
    expected.backward()

    torch._dynamo.reset()
    compiled: nn.Module = student
    if way == "in_place":
        student.compile(fullgraph=True, backend=BACKEND)
    else:
        compiled = torch.compile(student, backend=BACKEND)  # type: ignore[assignment]
    loss = loss_fn(compiled, images, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss_fn.last_parts["guided"].item() > 0
    for (name, got), want in zip(student.named_parameters(), eager.parameters(), strict=True):
        assert bool(torch.isfinite(got.grad).all()), name
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, got), want in zip(student.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)  # running averages move inside the graph too
