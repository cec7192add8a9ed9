"""The door between the wings: a calibrated student becomes a packed file (:mod:`qvit.packed`).

What evaluation applies to every image alike is folded into the layer before it, in float64 and rounded once: LayerScale
into the projections, a ``head`` rectifier into queries and keys (method.md, section 2: "In evaluation it is one affine
map a channel, so export folds it"). The file's meaning stands in :mod:`qvit.runtime.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm.layers
import torch
from timm.layers import LayerScale, PatchEmbed, resample_abs_pos_embed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from qvit import __version__
from qvit.architecture import Architecture, Branch, Norm
from qvit.config import Bits
from qvit.errors import CheckpointError, ConfigError, PackedFileError, UncalibratedError, UnsupportedModelError
from qvit.header import check_classes, check_preprocessing
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectify import EPS, HeadRectifier, TokenRectifier
from qvit.packed import PackedModel, pack_codes, write_packed
from qvit.train.checkpoint import ModelCard, load_checkpoint

_BLOCKS: dict[type, str] = {Block: "pre", ResPostBlock: "post", ParallelThingsBlock: "parallel"}
_NORMS: dict[type, str] = {
    nn.LayerNorm: "layer",
    timm.layers.LayerNorm: "layer",
    timm.layers.LayerNormFp32: "layer",
    nn.RMSNorm: "rms",
    timm.layers.RmsNorm: "rms",
    timm.layers.RmsNormFp32: "rms",
}
_MLPS: dict[type, str] = {timm.layers.Mlp: "plain", timm.layers.GluMlp: "glu", timm.layers.SwiGLU: "swiglu"}
_ACTIVATIONS: dict[type, str] = {
    timm.layers.activations.GELU: "gelu",
    timm.layers.activations.GELUTanh: "gelu_tanh",
    timm.layers.activations.QuickGELU: "quick_gelu",
    timm.layers.activations.Swish: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
_POOLS = ("token", "avg", "avgmax", "max")
_Affine = tuple[np.ndarray, np.ndarray]


def export(
    student: nn.Module,
    path: str | Path,
    *,
    preprocessing: Mapping[str, Any],
    classes: Sequence[str],
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a quantized model as a packed file, which runs without PyTorch.

    The file holds the model as it is in evaluation, whatever mode ``student`` is in, for images of one size:
    ``preprocessing["input_size"]``. The position embedding of a model with ``dynamic_img_size`` is resampled to it.

    Args:
        student: what :func:`qvit.quantize` returned, calibrated or trained.
        path: file to write; ``.safetensors`` is the usual suffix.
        preprocessing: input_size (channels, height, width), mean, std, crop_pct, crop_mode and interpolation, as
            ``timm.data.resolve_model_data_config`` gives them.
        classes: class names in the order of the logits.
        origin: how the model was made, for people; plain JSON data.

    Raises:
        UnsupportedModelError: naming the module that a packed file cannot represent.
        UncalibratedError: naming the quantizer that has no scale.
        ConfigError: if preprocessing or classes do not fit the model.
        PackedFileError: if the model holds a NaN, an infinity or a scale that float32 rounds to 0.
        OutputError: if the file cannot be written.
    """
    _check_quantized(student)
    assert isinstance(student, VisionTransformer)
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in preprocessing.items()}
    size = settings.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(type(side) is int for side in size):
        raise ConfigError(f"preprocessing.input_size must be channels, height and width, not {size!r}.")
    architecture = _describe(student, (size[1], size[2]))
    try:
        check_classes(list(classes), architecture.class_count)
        check_preprocessing(settings, (architecture.channels, *architecture.image_size))
    except PackedFileError as error:
        raise ConfigError(f"Cannot export {architecture.name}: {error}") from error
    with torch.no_grad():
        bits, tensors = _Folding(student, architecture).run()
    model = PackedModel(architecture, bits, settings, list(classes), dict(origin or {}), tensors)
    write_packed(path, model)


def export_checkpoint(checkpoint: str | Path, path: str | Path) -> None:
    """Write the quantized model of a checkpoint as a packed file, with its preprocessing, classes and origin.

    Raises:
        CheckpointError: if the checkpoint cannot be read or holds a float model.
        QvitError: as :func:`export`.
    """
    model, card = load_checkpoint(checkpoint)
    if card.quant_config is None:
        raise CheckpointError(
            f"{checkpoint} holds a float model: quantize it first, qvit train {card.name} --bits 4 --teacher "
            f"{checkpoint} ..."
        )
    export(model, path, preprocessing=card.preprocessing, classes=card.classes, origin=origin_of(card))


def origin_of(card: ModelCard) -> dict[str, Any]:
    """Return how a model was made, as a packed file keeps it for people and for the Hub's model card."""
    return {
        "qvit": __version__,
        "method": card.method,
        "metrics": card.metrics,
        "quantization": card.quant_config,
        "recipe": card.recipe,
    }


def _refuse(name: str, module: object, why: str) -> NoReturn:
    raise UnsupportedModelError(f"Cannot export {name} ({type(module).__name__}): {why}.")


def _check_quantized(student: nn.Module) -> None:
    if type(student) not in (VisionTransformer, VisionTransformerDistilled):
        _refuse("the model", student, "a packed file holds timm's VisionTransformer and its distilled variant")
    quantizers = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer)}
    if not quantizers:
        _refuse("the model", student, "it has no quantizers: pass what qvit.quantize returned")
    for name, quantizer in quantizers.items():
        if not quantizer.enabled:
            _refuse(name, quantizer, "it is switched off, so that this part of the model is in floating point")
        if not quantizer.calibrated:
            raise UncalibratedError(f"{name} has no scale yet: call qvit.calibrate(model, batches) before exporting.")


def _describe(model: VisionTransformer, image_size: tuple[int, int]) -> Architecture:
    """Return the architecture of ``model`` for images of ``image_size``, or refuse what it cannot say."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        _refuse("patch_embed", embed, "only timm's plain PatchEmbed is supported")
    proj = embed.proj
    plain = (proj.stride, proj.padding, proj.dilation, proj.groups) == (proj.kernel_size, (0, 0), (1, 1), 1)
    if not plain or proj.kernel_size != tuple(embed.patch_size):
        _refuse("patch_embed.proj", proj, "its patches overlap or are padded")
    _check_image_size(model, image_size)
    if model.attn_pool is not None or model.global_pool not in _POOLS:
        _refuse("the model", model, f"it pools by {model.global_pool!r}; a packed file knows {', '.join(_POOLS)}")
    for name in ("head", "head_dist"):
        if not isinstance(getattr(model, name, model.head), QuantLinear):
            _refuse(name, getattr(model, name), "a packed file holds a classifier")
    if not len(model.blocks):
        _refuse("blocks", model.blocks, "it is empty")

    distilled = isinstance(model, VisionTransformerDistilled)  # which looks at neither registers nor fc_norm
    registers = 0 if distilled or model.reg_token is None else model.reg_token.shape[1]
    prefix = int(model.cls_token is not None) + distilled + registers
    position = "none" if model.pos_embed is None else "patches" if model.no_embed_class else "all"
    if model.pos_embed is not None:
        covered = embed.num_patches + (prefix if position == "all" else 0)
        if model.pos_embed.shape[1] != covered:
            _refuse("pos_embed", model.pos_embed, f"it covers {model.pos_embed.shape[1]} tokens of {covered}")
    blocks = {name: _describe_block(f"blocks.{name}", block) for name, block in model.blocks.named_children()}
    first = blocks["0"]
    for name, block in blocks.items():
        for key, value in block.items():
            if value != first[key]:
                at, module = f"blocks.{name}", model.blocks[int(name)]
                _refuse(at, module, f"its {key} is {value}, that of blocks.0 is {first[key]}: all must be alike")
    return Architecture(
        name=_model_name(model),
        image_size=image_size,
        patch_size=(int(embed.patch_size[0]), int(embed.patch_size[1])),
        channels=proj.in_channels,
        embed_dim=proj.out_channels,
        depth=len(blocks),
        class_token=model.cls_token is not None,
        distillation_token=distilled,
        register_tokens=registers,
        position_embedding=position,
        embed_norm=_norm("patch_embed.norm", embed.norm),
        pre_norm=_norm("norm_pre", model.norm_pre),
        final_norm=_norm("norm", model.norm),
        pool_norm=None if distilled else _norm("fc_norm", model.fc_norm),
        pool=model.global_pool,
        pool_skip=0 if model.global_pool == "token" or model.pool_include_prefix else prefix,
        class_count=model.head.out_features,
        **first,
    )


def _check_image_size(model: VisionTransformer, image_size: tuple[int, int]) -> None:
    embed = model.patch_embed
    if model.dynamic_img_size:
        if any(side % patch for side, patch in zip(image_size, embed.patch_size, strict=True)):
            raise ConfigError(
                f"preprocessing.input_size {image_size} must be whole patches of {tuple(embed.patch_size)} pixels."
            )
    elif image_size != tuple(embed.img_size):
        raise ConfigError(
            f"preprocessing.input_size {image_size} is not the model's image size {tuple(embed.img_size)}."
        )


def _model_name(model: VisionTransformer) -> str:
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return str(configuration.get("architecture") or type(model).__name__)


def _describe_block(name: str, block: nn.Module) -> dict[str, Any]:
    if type(block) not in _BLOCKS:
        _refuse(name, block, f"a packed file knows {', '.join(kind.__name__ for kind in _BLOCKS)}")
    paths: list[tuple[str, Any, Any, Any]]
    if isinstance(block, ParallelThingsBlock):
        attentions: Any = enumerate(block.attns)
        mlps: Any = enumerate(block.ffns)
        paths = [(f"{name}.attns.{j}", path.norm, path.attn, None) for j, path in attentions]
        paths += [(f"{name}.ffns.{j}", path.norm, None, path.mlp) for j, path in mlps]
    else:
        paths = [(name, block.norm1, block.attn, block.mlp), (name, block.norm2, None, None)]
    described: dict[str, Any] = {
        "block": _BLOCKS[type(block)],
        "parallel": max(1, len(paths) // 2) if isinstance(block, ParallelThingsBlock) else 1,
    }
    for path, norm, attention, mlp in paths:
        found = {"norm": _norm(f"{path}.norm", norm)}
        if found["norm"] is None:
            _refuse(f"{path}.norm", norm, "a block needs its norms")
        if attention is not None:
            found |= _describe_attention(f"{path}.attn", attention)
        if mlp is not None:
            found |= _describe_mlp(f"{path}.mlp", mlp)
        for key, value in found.items():
            if described.setdefault(key, value) != value:
                _refuse(path, block, f"its {key} is {value} and {described[key]}: all must be alike")
    return described


def _describe_attention(name: str, attention: Any) -> dict[str, Any]:
    if type(attention) is not QuantAttention:
        _refuse(name, attention, "it is no attention of qvit's")
    query, key = attention.query_rectifier, attention.key_rectifier
    kinds = {HeadRectifier: "head", TokenRectifier: "token", nn.Identity: None}
    if type(query) not in kinds or type(key) is not type(query):
        _refuse(f"{name}.query_rectifier", query, "it is no rectifier of qvit's, or another than the keys'")
    q_norm, k_norm = _norm(f"{name}.q_norm", attention.q_norm), _norm(f"{name}.k_norm", attention.k_norm)
    if q_norm != k_norm:
        _refuse(f"{name}.k_norm", attention.k_norm, "it is another norm than that of the queries")
    return {
        "num_heads": attention.num_heads,
        "head_dim": attention.head_dim,
        "attention_scale": float(attention.scale),
        "rectify": kinds[type(query)],
        "qk_norm": q_norm,
        "attention_norm": _norm(f"{name}.norm", attention.norm),
    }


def _describe_mlp(name: str, mlp: Any) -> dict[str, Any]:
    if type(mlp) not in _MLPS:
        _refuse(name, mlp, f"a packed file knows {', '.join(kind.__name__ for kind in _MLPS)}")
    for layer, module in mlp.named_children():
        if layer.startswith("fc") and not isinstance(module, QuantLinear):
            _refuse(f"{name}.{layer}", module, "it is no quantized linear layer")
    activation = _ACTIVATIONS.get(type(mlp.act))
    if isinstance(mlp.act, nn.GELU):
        activation = {"none": "gelu", "tanh": "gelu_tanh"}[mlp.act.approximate]
    if activation is None:
        known = ", ".join(sorted(set(_ACTIVATIONS.values())))
        _refuse(f"{name}.act", mlp.act, f"a packed file knows the activations {known}")
    return {
        "mlp": _MLPS[type(mlp)],
        "mlp_hidden": mlp.fc2.in_features,
        "gate_last": bool(getattr(mlp, "gate_last", False)),
        "activation": activation,
        "mlp_norm": _norm(f"{name}.norm", mlp.norm),
    }


def _norm(name: str, module: nn.Module) -> Norm | None:
    if isinstance(module, nn.Identity):
        return None
    kind = _NORMS.get(type(module))
    if kind is None:
        _refuse(name, module, "it is no LayerNorm and no RMSNorm")
    eps = getattr(module, "eps", None)
    return Norm(kind, float(torch.finfo(torch.float32).eps if eps is None else eps))


class _Folding:
    """Turns the modules of one model into bits and tensors of its packed file."""

    def __init__(self, model: VisionTransformer, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.bits: dict[str, Bits] = {}
        self.tensors: dict[str, np.ndarray] = {}

    def run(self) -> tuple[dict[str, Bits], dict[str, np.ndarray]]:
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
        scale = _wide(weights.scale).reshape(outputs)
        bias = np.zeros(outputs) if layer.bias is None else _wide(layer.bias)
        if affine is not None:
            factor, shift = affine
            scale, bias = scale * factor, bias * factor + shift
        self.tensors[f"{name}.codes"] = pack_codes(codes, weights.bits)
        self._store(f"{name}.scale", scale)
        self._store(f"{name}.bias", bias)
        self._store(f"{name}.input_scale", _wide(inputs.scale).reshape(1))
        self._store(f"{name}.input_offset", _wide(inputs.offset).reshape(1))

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
                self._store(f"{name}.{part}.gamma", _wide(rectifier.gamma).reshape(sizes))
                self._store(f"{name}.{part}.beta", _wide(rectifier.beta).reshape(sizes))
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
            self._store(f"{name}.{operand}.scale", _wide(quantizer.scale).reshape(-1))
            if quantizer.offset is not None:
                self._store(f"{name}.{operand}.offset", _wide(quantizer.offset).reshape(-1))
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
            _refuse(f"{path}.ls{suffix}", module, f"only timm's LayerScale can follow {kind}")
        return _wide(module.gamma), np.zeros(len(module.gamma))

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
            np.ones(width) if weight is None else _wide(weight),
            np.zeros(width) if bias is None else _wide(bias),
        )

    def _tokens(self) -> None:
        """Store the prefix tokens in timm's order, with their position embedding, and the patches' own."""
        model, net = self.model, self.architecture
        # A distilled model keeps the register tokens that it was made with, and does not use them.
        parts = [model.cls_token, *([model.dist_token] if net.distillation_token else [model.reg_token])]
        tokens = [_wide(part)[0] for part in parts if part is not None]
        prefix = np.concatenate(tokens) if tokens else np.zeros((0, net.embed_dim))
        if model.pos_embed is not None:
            covered = net.prefix_tokens if net.position_embedding == "all" else 0
            position = model.pos_embed
            if model.dynamic_img_size:
                position = resample_abs_pos_embed(
                    position, list(net.grid), list(model.patch_embed.grid_size), num_prefix_tokens=covered
                )
            embedding = _wide(position)[0]
            prefix[:covered] += embedding[:covered]
            self._store("position_embedding", embedding[covered:])
        if net.prefix_tokens:
            self._store("prefix_tokens", prefix)

    def _store(self, name: str, values: np.ndarray) -> None:
        self.tensors[name] = values.astype(np.float32)


def _head_affine(name: str, rectifier: HeadRectifier) -> _Affine:
    """Return factor and shift ``(H, D)`` of a ``head`` rectifier in evaluation: ``q~ = factor * q + shift``."""
    gamma, beta = _wide(rectifier.gamma)[:, 0], _wide(rectifier.beta)[:, 0]
    mean, variance = _wide(rectifier.running_mean)[:, 0], _wide(rectifier.running_var)[:, 0]
    divisor = gamma * np.sqrt(variance + EPS)
    if not divisor.all():
        _refuse(name, rectifier, "its gamma holds a 0, by which it divides")
    return 1 / divisor, (beta - mean) / divisor


def _wide(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().double().cpu().numpy())
