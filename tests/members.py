"""Members of the family: one small model for everything that a packed file can say, and students of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import GluMlp, LayerNormFp32, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

import qvit
from qvit import QuantConfig, quantize
from qvit.format.packed import PackedModel, read_packed
from qvit.models.families import image_size_of
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectifier import Rectifier
from qvit.runtime.reference import ReferenceEngine

VIT = "vit_tiny_patch16_224"


DEIT = "deit_tiny_patch16_224"


DISTILLED = "deit_tiny_distilled_patch16_224"


SWIN = "swin_tiny_patch4_window7_224"


CLASSES = [f"class {n}" for n in range(10)]


MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": (DEIT, {}),
    "distilled": (DISTILLED, {}),
    "distilled_with_unused_parts": (DISTILLED, {"reg_tokens": 2, "fc_norm": True, "depth": 1}),
    "average_pool": (VIT, {"global_pool": "avg"}),
    "average_pool_with_prefix": (VIT, {"global_pool": "avg", "pool_include_prefix": True}),
    "largest_pool": (VIT, {"global_pool": "max", "fc_norm": False}),
    "both_pools": (VIT, {"global_pool": "avgmax", "reg_tokens": 1}),
    "token_with_pool_norm": (VIT, {"fc_norm": True}),
    "no_final_norm": (VIT, {"final_norm": False}),
    "layer_scale": (VIT, {"init_values": 0.5}),
    "qk_norm": (VIT, {"qk_norm": True}),
    "register_tokens": (VIT, {"reg_tokens": 4}),
    "patches_embedded_alone": (VIT, {"no_embed_class": True, "reg_tokens": 2}),
    "no_position_embedding": (VIT, {"pos_embed": "none"}),
    "no_class_token": (VIT, {"class_token": False, "global_pool": "avg"}),
    "not_square": (VIT, {"img_size": (16, 24), "patch_size": (4, 8)}),
    "partial_patches": (VIT, {"img_size": (18, 19)}),
    "dynamic_size": (VIT, {"dynamic_img_size": True}),
    "dynamic_size_padded": (VIT, {"dynamic_img_size": True, "dynamic_img_pad": True, "reg_tokens": 1}),
    "swiglu": (VIT, {"mlp_layer": SwiGLU}),
    "packed_swiglu": (VIT, {"mlp_layer": SwiGLUPacked, "act_layer": "silu"}),
    "glu_gate_last": (VIT, {"mlp_layer": GluMlp}),
    "pre_norm": (VIT, {"pre_norm": True}),
    "patch_norm": (VIT, {"embed_norm_layer": "layernorm"}),
    "post_norm": (VIT, {"block_fn": ResPostBlock, "init_values": 0.5}),
    "parallel": (VIT, {"block_fn": ParallelThingsBlock, "init_values": 0.5}),
    "three_parallel": (VIT, {"block_fn": partial(ParallelThingsBlock, num_parallel=3), "depth": 1, "qk_norm": True}),
    "attention_norm": (VIT, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "glu_with_norm": (VIT, {"mlp_layer": GluMlp, "scale_mlp_norm": True}),
    "swiglu_with_norm": (VIT, {"mlp_layer": SwiGLU, "scale_mlp_norm": True}),
    "rms_norm": (VIT, {"norm_layer": nn.RMSNorm, "qk_norm": True}),
    "rms_norm_eps": (VIT, {"norm_layer": partial(nn.RMSNorm, eps=1e-2)}),
    "other_eps": (VIT, {"norm_layer": partial(LayerNormFp32, eps=1e-2), "qk_norm": True}),
    "no_affine_norm": (VIT, {"norm_layer": partial(RmsNorm, affine=False), "qk_norm": True}),
    "one_head": (VIT, {"num_heads": 1}),
    "no_bias": (VIT, {"qkv_bias": False, "proj_bias": False}),
    "gelu_tanh": (VIT, {"act_layer": "gelu_tanh"}),
    "torch_gelu_tanh": (VIT, {"act_layer": partial(nn.GELU, approximate="tanh")}),
    "quick_gelu": (VIT, {"act_layer": "quick_gelu"}),
    "silu": (VIT, {"act_layer": "silu"}),
    "relu": (VIT, {"act_layer": "relu"}),
    "one_channel": (VIT, {"in_chans": 1}),
}


SIZES = {"not_square": (16, 24), "partial_patches": (18, 19), "dynamic_size": (24, 20), "dynamic_size_padded": (12, 16)}


SMALL_SWIN: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2)}


SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


FAMILIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "swin": {
        "swin": (SWIN, SMALL_SWIN),
        "swin_not_square": (SWIN, {**SMALL_SWIN, "img_size": (32, 64), "window_size": (2, 4), "global_pool": "max"}),
        "swin_one_window": (SWIN, {**SMALL_SWIN, "img_size": (16, 32), "depths": (2,), "num_heads": (3,)}),
        "swin_head_dim": (SWIN, {**SMALL_SWIN, "head_dim": 8, "qkv_bias": False, "norm_layer": nn.RMSNorm}),
        "swin_features": (SWIN, {**SMALL_SWIN, "num_classes": 0}),
    },
    "swinv2": {
        "swinv2": ("swinv2_tiny_window8_256", SMALL_SWIN),
        "swinv2_pretrained_window": (
            "swinv2_tiny_window8_256",
            {**SMALL_SWIN, "pretrained_window_sizes": (12, 6), "qkv_bias": False, "img_size": (16, 32)},
        ),
    },
    "swinv2_cr": {
        "swinv2_cr": ("swinv2_cr_tiny_224", SMALL_SWIN),
        "swinv2_cr_stage_norms": ("swinv2_cr_tiny_ns_224", {**SMALL_SWIN, "img_size": (32, 16), "num_classes": 0}),
    },
    "beit": {
        "beit": ("beit_base_patch16_224", {**SMALL, "init_values": 0.5}),
        "beit_shared_bias": (
            "beit_base_patch16_224",
            {**SMALL, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "global_pool": "token"},
        ),
        "beit_all": (
            "beit_base_patch16_224",
            {**SMALL, "use_shared_rel_pos_bias": True, "swiglu_mlp": True, "scale_mlp": True, "use_abs_pos_emb": True},
        ),
        "beit_features": ("beit_base_patch16_224", {**SMALL, "num_classes": 0, "img_size": (16, 24)}),
    },
    "relpos": {
        "relpos": ("vit_relpos_small_patch16_224", {**SMALL, "init_values": 0.5}),
        "relpos_class_token": ("vit_relpos_base_patch16_clsgap_224", {**SMALL, "qk_norm": True}),
        "relpos_mlp": ("vit_relpos_base_patch32_plus_rpn_256", SMALL),
        "relpos_shared": ("vit_srelpos_small_patch16_224", {**SMALL, "img_size": (16, 24)}),
    },
    "eva": {
        "eva02": ("eva02_tiny_patch14_224", SMALL),
        "eva02_inner_norms": ("eva02_base_patch14_224", SMALL),
        "eva": ("eva_giant_patch14_224", {**SMALL, "init_values": 0.5}),
        "eva_post_norm": ("eva02_tiny_patch14_224", {**SMALL, "use_post_norm": True, "use_rot_pos_emb": False}),
        "dinov3": ("vit_small_patch16_dinov3", {**SMALL, "num_classes": 0}),
        "dinov3_plus": ("vit_small_plus_patch16_dinov3", {**SMALL, "dynamic_img_size": False, "qk_norm": True}),
        "mixed_rotary": ("vit_small_patch16_rope_mixed_224", SMALL),
        "perception_encoder": ("vit_pe_core_tiny_patch16_384", SMALL),
    },
    "siglip": {
        "siglip": ("vit_base_patch16_siglip_224", SMALL),
        "siglip_classifier": ("vit_base_patch16_siglip_gap_224", {**SMALL, "global_pool": "map", "fc_norm": True}),
    },
}
"""Small models of every family but the plain vision transformer, whose members are :data:`MEMBERS`."""


FAMILY_MEMBERS = {member: model for family in FAMILIES.values() for member, model in family.items()}


def vary(model: nn.Module) -> nn.Module:
    """Give a float model weights with which attention is not flat and no bias zero, as training might."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("qkv.weight"):
                parameter.normal_(std=0.35)
            elif "norm" in key and not parameter.any():
                parameter.normal_(float(key.endswith("weight")), std=0.1)
            elif key.endswith("logit_scale"):
                parameter.normal_(2.0, std=0.3)
            elif parameter.ndim >= 2 and "embed" not in key and "token" not in key:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "embed" in key or "token" in key:
                parameter.normal_(std=0.3)
    return model


def family_member(member: str) -> tuple[nn.Module, Tensor]:
    """Return a small float model of :data:`FAMILY_MEMBERS`, and images for it."""
    name, kwargs = FAMILY_MEMBERS[member]
    torch.manual_seed(0)
    given = {"num_classes": len(CLASSES), "drop_path_rate": 0.0, **kwargs}
    model = vary(timm.create_model(name, **given)).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, images_for(3, image_size_of(model))


def fake_quantized_codes(student: nn.Module, images: Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return logits and the codes of every activation quantizer, by the name that it has in the packed file."""
    codes: dict[str, np.ndarray] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args: codes.__setitem__(name, module.codes(args[0]).numpy())

    hooks = []
    for name, module in student.named_modules():
        if isinstance(module, Quantizer) and module.batched:
            short = name.removesuffix(".input_quantizer").removesuffix("_quantizer")
            short = re.sub(r"\.attention$", ".map", short)
            short = re.sub(r"\.q_proj$", ".qkv", short)  # three layers with one input are one layer in the file
            hooks.append(module.register_forward_pre_hook(watch(short)))
    with torch.no_grad():
        logits = student(images).numpy()
    for hook in hooks:
        hook.remove()
    return logits, codes


def check_same(student: nn.Module, model: PackedModel, images: Tensor) -> None:
    """Check that a packed model computes what a student does, image by image.

    A value in the middle between two codes may fall to either side, and then the rest of its image differs a little:
    that happens in few images. Where all codes of an image are the same, its outputs are.
    """
    found: dict[str, np.ndarray] = {}
    outputs = ReferenceEngine(model, found.__setitem__)(images.numpy())
    expected, codes = fake_quantized_codes(student, images)
    assert outputs.dtype == np.float32
    assert found.keys() == codes.keys()
    differing = np.zeros((2, len(images)))
    for name, wanted in codes.items():
        if name == "patch_embed.proj":  # an image of codes in the model, patches of them in the reference
            continue
        assert found[name].size == wanted.size, name
        differences = (found[name].reshape(wanted.shape) != wanted).reshape(len(images), -1)
        differing += differences.sum(axis=1), np.full(len(images), differences.shape[1])
    same = differing[0] == 0
    assert same.mean() >= 0.5
    assert differing[0].sum() < 0.05 * differing[1].sum()
    distances = np.linalg.norm(outputs - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distances[same].max() < 1e-6


def preprocessing(size: tuple[int, ...] = (3, 16, 16)) -> dict[str, Any]:
    return {
        "input_size": list(size),
        "mean": [0.5] * size[0],
        "std": [0.25] * size[0],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }


def images_for(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(8, channels, *size, generator=torch.Generator().manual_seed(1))


def scramble(student: nn.Module) -> None:
    """Give every part that export folds or stores a value of its own, of either sign, as training might."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, Rectifier):
                module.gamma.mul_(torch.empty_like(module.gamma).uniform_(0.8, 1.25, generator=generator))
                module.gamma[0, 0, 0].neg_()
                module.beta.add_(torch.empty_like(module.beta).normal_(std=0.1, generator=generator))
            elif type(module).__name__ == "LayerScale":
                module.gamma.copy_(torch.empty_like(module.gamma).normal_(std=0.7, generator=generator))
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.weight.mul_(torch.empty_like(module.weight).uniform_(0.7, 1.3, generator=generator))


def student_of(teacher: nn.Module, images: Tensor, config: QuantConfig) -> nn.Module:
    """Return a student with the scales of the data's whole range: quicker than calibration, and as good here."""
    student = quantize(teacher, config).eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, Rectifier):
                module.register_forward_pre_hook(lambda rectifier, args: rectifier.fit(args[0]))
            elif isinstance(module, Quantizer) and module.batched:
                module.enabled = False
                module.register_forward_pre_hook(cover)
            elif isinstance(module, (QuantLinear, QuantConv2d)):
                quantizer, weight = module.weight_quantizer, module.weight.flatten(1)
                quantizer.set(weight.abs().amax(1).clamp(min=1e-3) / -quantizer.low)
        student(images)
    for module in student.modules():
        module._forward_pre_hooks.clear()
        if isinstance(module, Quantizer):
            module.enabled = True
    scramble(student)
    return student


def cover(quantizer: Quantizer, args: tuple[Tensor]) -> None:
    rows = (
        args[0].movedim(1, 0).reshape(quantizer.log_scale.numel(), -1)
        if quantizer.log_scale.ndim
        else args[0].reshape(1, -1)
    )
    low = rows.amin(1) if quantizer.offset is not None else torch.zeros(len(rows))
    scale = (rows.amax(1) - low).clamp(min=1e-3) / (quantizer.high - quantizer.low)
    quantizer.set(scale, low - scale * quantizer.low)


def packed(student: nn.Module, path: Path, images: Tensor, **kwargs: Any) -> PackedModel:
    given = {"preprocessing": preprocessing(tuple(images.shape[1:])), "classes": CLASSES, **kwargs}
    qvit.export(student, path, **given)
    return read_packed(path)
