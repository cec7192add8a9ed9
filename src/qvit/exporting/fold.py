"""Modules become tensors of a packed file: what evaluation applies to every image alike is folded into a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from timm.layers import LayerScale, resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn

from qvit.config import Bits
from qvit.format.architecture import Architecture, Branch, Norm
from qvit.format.codes import pack_codes
from qvit.models.vit import refuse
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectify import EPS, HeadRectifier

_Affine = tuple[np.ndarray, np.ndarray]


class Folding:
    """Turns the modules of one model into bits and tensors of its packed file."""

    def __init__(self, model: VisionTransformer, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.bits: dict[str, Bits] = {}
        self.tensors: dict[str, np.ndarray] = {}

    def run(self) -> tuple[dict[str, Bits], dict[str, np.ndarray]]:
        """Return bits and tensors by name."""
        net = self.architecture
        self._linear("patch_embed.proj")
        self._norm("patch_embed.norm", net.embed_norm)
        self._tokens()
        self._norm("norm_pre", net.pre_norm)
        for branch in net.branches():
            self._norm(branch.norm, net.norm)
            if branch.is_attention:
                self._attention(branch)
            else:
                *first, last = net.branch_layers(branch)
                for layer in first:
                    self._linear(layer.name)
                self._norm(f"{branch.name}.norm", net.mlp_norm)
                self._linear(last.name, self._layer_scale(branch))
        self._norm("norm", net.final_norm)
        self._norm("fc_norm", net.pool_norm)
        for name in net.head_names:
            self._linear(name)
        return self.bits, self.tensors

    def _linear(self, name: str, affine: _Affine | None = None) -> None:
        """Store a linear layer, followed by ``y * factor + shift`` a channel if an ``affine`` map is given."""
        layer: Any = self.model.get_submodule(name)
        assert isinstance(layer, (QuantLinear, QuantConv2d))
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert inputs.offset is not None
        self.bits[name] = Bits(weights.bits, inputs.bits)
        outputs = layer.weight.shape[0]
        codes = weights.codes(layer.weight).reshape(outputs, -1).cpu().numpy()
        scale = wide(weights.scale).reshape(outputs)
        bias = np.zeros(outputs) if layer.bias is None else wide(layer.bias)
        if affine is not None:
            factor, shift = affine
            scale, bias = scale * factor, bias * factor + shift
        self.tensors[f"{name}.codes"] = pack_codes(codes, weights.bits)
        self._store(f"{name}.scale", scale)
        self._store(f"{name}.bias", bias)
        self._store(f"{name}.input_scale", wide(inputs.scale).reshape(1))
        self._store(f"{name}.input_offset", wide(inputs.offset).reshape(1))

    def _attention(self, branch: Branch) -> None:
        net, name = self.architecture, branch.name
        attention: Any = self.model.get_submodule(name)
        sizes = net.num_heads, net.head_dim
        folded: list[_Affine] = [(np.ones(sizes), np.zeros(sizes)) for _ in range(3)]
        if net.rectify == "head":
            for index, part in enumerate(("query_rectifier", "key_rectifier")):
                folded[index] = _head_affine(f"{name}.{part}", getattr(attention, part))
        elif net.rectify == "token":
            for part in ("query_rectifier", "key_rectifier"):
                rectifier = getattr(attention, part)
                self._store(f"{name}.{part}.gamma", wide(rectifier.gamma).reshape(sizes))
                self._store(f"{name}.{part}.beta", wide(rectifier.beta).reshape(sizes))
        if net.qk_norm is None:
            factors, shifts = (
                np.concatenate([part.reshape(-1) for part in side]) for side in zip(*folded, strict=True)
            )
            self._linear(f"{name}.qkv", (factors, shifts))
        else:
            self._linear(f"{name}.qkv")
            for part, (factor, shift) in zip(("q_norm", "k_norm"), folded, strict=False):
                weight, bias = self._norm_affine(f"{name}.{part}", net.head_dim)
                self._store(f"{name}.{part}.weight", weight * factor)
                self._store(f"{name}.{part}.bias", bias * factor + shift)
        for operand in ("query", "key", "value", "attention"):
            quantizer: Quantizer = getattr(attention, f"{operand}_quantizer")
            self.bits[f"{name}.{operand}"] = Bits(quantizer.bits, quantizer.bits)
            self._store(f"{name}.{operand}.scale", wide(quantizer.scale).reshape(-1))
            if quantizer.offset is not None:
                self._store(f"{name}.{operand}.offset", wide(quantizer.offset).reshape(-1))
        self._norm(f"{name}.norm", net.attention_norm)
        self._linear(f"{name}.proj", self._layer_scale(branch))

    def _layer_scale(self, branch: Branch) -> _Affine | None:
        """Return the LayerScale that follows a branch, if one does."""
        if self.architecture.block == "post":
            return None
        path, _, kind = branch.name.rpartition(".")
        suffix = {"pre": "1" if branch.is_attention else "2", "parallel": ""}[self.architecture.block]
        module = self.model.get_submodule(f"{path}.ls{suffix}")
        if isinstance(module, nn.Identity):
            return None
        if type(module) is not LayerScale:
            refuse(f"{path}.ls{suffix}", module, f"only timm's LayerScale can follow {kind}")
        return wide(module.gamma), np.zeros(len(module.gamma))

    def _norm(self, name: str, norm: Norm | None) -> None:
        if norm is None:
            return
        module: Any = self.model.get_submodule(name)
        weight, bias = self._norm_affine(name, module.normalized_shape[0])
        self._store(f"{name}.weight", weight)
        self._store(f"{name}.bias", bias)

    def _norm_affine(self, name: str, width: int) -> _Affine:
        module: Any = self.model.get_submodule(name)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        return (
            np.ones(width) if weight is None else wide(weight),
            np.zeros(width) if bias is None else wide(bias),
        )

    def _tokens(self) -> None:
        """Store the prefix tokens in timm's order, with their position embedding, and the patches' own."""
        model, net = self.model, self.architecture
        # A distilled model keeps the register tokens that it was made with, and does not use them.
        parts = [model.cls_token, *([model.dist_token] if net.distillation_token else [model.reg_token])]
        tokens = [wide(part)[0] for part in parts if part is not None]
        prefix = np.concatenate(tokens) if tokens else np.zeros((0, net.embed_dim))
        if model.pos_embed is not None:
            covered = net.prefix_tokens if net.position_embedding == "all" else 0
            position = model.pos_embed
            if model.dynamic_img_size:
                position = resample_abs_pos_embed(
                    position, list(net.grid), list(model.patch_embed.grid_size), num_prefix_tokens=covered
                )
            embedding = wide(position)[0]
            prefix[:covered] += embedding[:covered]
            self._store("position_embedding", embedding[covered:])
        if net.prefix_tokens:
            self._store("prefix_tokens", prefix)

    def _store(self, name: str, values: np.ndarray) -> None:
        self.tensors[name] = values.astype(np.float32)


def _head_affine(name: str, rectifier: HeadRectifier) -> _Affine:
    """Return factor and shift ``(H, D)`` of a ``head`` rectifier in evaluation: ``q~ = factor * q + shift``."""
    gamma, beta = wide(rectifier.gamma)[:, 0], wide(rectifier.beta)[:, 0]
    mean, variance = wide(rectifier.running_mean)[:, 0], wide(rectifier.running_var)[:, 0]
    divisor = gamma * np.sqrt(variance + EPS)
    if not divisor.all():
        refuse(name, rectifier, "its gamma holds a 0, by which it divides")
    return 1 / divisor, (beta - mean) / divisor


def wide(tensor: Tensor) -> np.ndarray:
    """Return ``tensor`` in float64."""
    return np.asarray(tensor.detach().double().cpu().numpy())
