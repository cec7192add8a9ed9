"""A timm vision transformer in, the same model with quantized modules out."""

from __future__ import annotations

import copy
import difflib
import functools
import re
from typing import Any

from timm.layers import Attention, LayerScale, PatchEmbed
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import nn

from qvit.config import QuantConfig
from qvit.errors import ConfigError, UnsupportedModelError
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Float32Module

_BLOCKS = (Block, ResPostBlock, ParallelThingsBlock)
# Modules that own parameters and stay in floating point (method.md, section 1: LayerNorm and the residual stream do).
_FLOAT = (nn.LayerNorm, nn.RMSNorm, LayerScale, VisionTransformer)


def quantize(teacher: nn.Module, config: QuantConfig | None = None) -> VisionTransformer:
    """Return a fully quantized copy of a timm vision transformer; ``teacher`` is untouched.

    Every linear layer and both attention products work on codes, the patch embedding and the heads on 8 bits. The copy
    keeps timm's module names and loads the float model's state dict. Its scales are not set yet: pass it to
    :func:`qvit.calibrate` before running it. It is in training mode; its ``no_weight_decay()`` names what timm's
    optimizers must leave alone: beside timm's own list every log_scale, offset, gamma and beta.

    Args:
        teacher: a member of timm's ``VisionTransformer`` family (ViT, DeiT, with or without distillation token,
            register tokens, LayerScale, qk-norm; any image size).
        config: bits and rectification; 4 bits with ``rectify="head"`` by default.

    Raises:
        UnsupportedModelError: naming the module that cannot be quantized and its class.
        ConfigError: naming an override that matches no layer.
    """
    config = config or QuantConfig()
    if not isinstance(teacher, VisionTransformer):
        raise UnsupportedModelError(
            f"qvit quantizes timm's VisionTransformer family (vit_*, deit_*); {type(teacher).__name__} is not of it."
        )
    _check(teacher)
    check_overrides(teacher, config)
    # A teacher is often frozen for distillation; its student is there to be trained.
    student = copy.deepcopy(teacher).requires_grad_(True)
    for name, module in list(student.named_modules()):
        replacement: nn.Module
        if isinstance(module, Attention):
            replacement = QuantAttention(module, config, name)
        elif isinstance(module, nn.Linear):
            replacement = QuantLinear(module, config.bits(name))
        elif isinstance(module, nn.Conv2d):
            replacement = QuantConv2d(module, config.bits(name))
        else:
            continue
        # An Attention comes before its own linear layers, which are then replaced inside the QuantAttention.
        student.set_submodule(name, replacement.to(next(module.parameters()).device))
    own = [
        f"{prefix}.{name}"
        for prefix, module in student.named_modules()
        if isinstance(module, Float32Module)
        for name, _ in module.named_parameters(recurse=False)
    ]
    kept = [*teacher.no_weight_decay(), *own]
    # torch.compile's wrapper hands the question on, and calls its parameters otherwise.
    kept += [f"_orig_mod.{name}" for name in kept]
    # Of this one model, not of its class; a partial of plain data, that copies and pickles of the student take along.
    student.no_weight_decay = functools.partial(set, kept)
    student.register_load_state_dict_pre_hook(_keep_scales)
    return student.train()


def layers_with_bits(model: nn.Module) -> list[str]:
    """Return the names that a :class:`QuantConfig` is asked for when ``model``, a float one, is quantized."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            names += [f"{name}.{operand}_quantizer" for operand in ("query", "key", "value", "attention")]
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            names.append(name)
    return names


def check_overrides(model: nn.Module, config: QuantConfig) -> None:
    """Refuse a pattern in ``config.overrides`` that no layer of ``model``, a float one, is called by.

    Raises:
        ConfigError: naming the pattern and what is called nearly so.
    """
    names = layers_with_bits(model)
    for pattern in config.unmatched(names):
        groups = {f"{name[: dot.start()]}.*" for name in names for dot in re.finditer(r"\.", name)}
        near = difflib.get_close_matches(pattern, [*names, *sorted(groups)], 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"layers are called like {names[0]!r}."
        raise ConfigError(f"The override {pattern!r} matches no layer of the model: {hint}")


def _keep_scales(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a float model's state dict, which has no scales at all, leave those of a student as they are."""
    own = {
        f"{prefix}{path}.{name}": value
        for path, part in module.named_modules()
        if isinstance(part, Float32Module)
        for name, value in part.state_dict().items()
    }
    if not own.keys() & state_dict.keys():
        state_dict.update(own)


def _check(model: VisionTransformer) -> None:
    """Refuse, by name, whatever would silently stay in floating point or break."""

    def refuse(name: str, module: nn.Module, why: str) -> None:
        raise UnsupportedModelError(f"Cannot quantize {name} ({type(module).__name__}): {why}.")

    if not isinstance(model.patch_embed, PatchEmbed):
        refuse("patch_embed", model.patch_embed, "only timm's plain PatchEmbed is supported")
    if model.attn_pool is not None:
        refuse("attn_pool", model.attn_pool, "attention pooling is not supported; use global_pool='token' or 'avg'")
    for index, block in enumerate(model.blocks):
        if not isinstance(block, _BLOCKS):
            refuse(f"blocks.{index}", block, "this kind of block computes its own attention")
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            if getattr(module, "gate", None) is not None:
                refuse(name, module, "gated attention is not supported")
            if type(module).forward is not Attention.forward:
                refuse(name, module, "it computes attention in its own way")
            continue
        if name.endswith(".attn"):
            refuse(name, module, "only timm's Attention is supported, the products of another would stay in float")
        owns_parameters = next(module.parameters(recurse=False), None) is not None
        if owns_parameters and not isinstance(module, (nn.Linear, nn.Conv2d, *_FLOAT)):
            refuse(name, module, "its parameters are of a kind that qvit does not know")
