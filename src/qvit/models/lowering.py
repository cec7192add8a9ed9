"""A quantized model becomes a program and its tensors: what all families have in common.

A family (one file each beside this one) walks its model once and names modules; the tensors are functions that nobody
calls where only the program is wanted. What evaluation applies to every image alike is folded into the layer before it,
in float64 and rounded once: LayerScale into the projections, a ``head`` rectifier into queries and keys
(docs/method.md, section 2). What a file means stands in :mod:`qvit.runtime.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import timm.layers
import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from qvit.config import Bits
from qvit.errors import UnsupportedModelError
from qvit.format.branches import Attention, Mlp
from qvit.format.codes import pack_codes
from qvit.format.ops import ACTIVATIONS, OPERANDS, Layer, Norm
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectify import EPS, HeadRectifier, TokenRectifier

_NORMS: dict[type, str] = {
    nn.LayerNorm: "layer",
    timm.layers.LayerNorm: "layer",
    timm.layers.LayerNormFp32: "layer",
    nn.RMSNorm: "rms",
    timm.layers.RmsNorm: "rms",
    timm.layers.RmsNormFp32: "rms",
}
# timm calls them by the file's names; what it takes from PyTorch stands beside its own classes.
_ACTIVATIONS: dict[type, str] = {
    **{timm.layers.get_act_layer(name): name for name in ACTIVATIONS},
    timm.layers.activations.GELU: "gelu",
    timm.layers.activations.Swish: "silu",
    nn.SiLU: "silu",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_MLPS: dict[type, str] = {timm.layers.Mlp: "plain", timm.layers.GluMlp: "glu", timm.layers.SwiGLU: "swiglu"}

Affine = tuple[np.ndarray, np.ndarray]
"""Factor and shift of ``y * factor + shift``, each a value per channel, float64."""
Values = Callable[[], np.ndarray]


def refuse(name: str, module: object, why: str) -> NoReturn:
    """Raise the error that names a module which a packed file cannot represent."""
    raise UnsupportedModelError(f"Cannot export {name} ({type(module).__name__}): {why}.")


def wide(tensor: Tensor) -> np.ndarray:
    """Return ``tensor`` in float64."""
    return np.asarray(tensor.detach().double().cpu().numpy())


class Lowering:
    """Makes operations of the modules of one model, by name, and keeps how their tensors are made.

    Args:
        model: what :func:`qvit.quantize` returned; for the program alone it need not be calibrated.
        image_size: of the images, (height, width).
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int]) -> None:
        self.model, self.image_size = model, image_size
        self._values: dict[str, Values] = {}

    def module(self, name: str) -> Any:
        """Return the module called ``name``."""
        return self.model.get_submodule(name)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return every tensor of the file, float32 or codes."""
        made = {name: make() for name, make in self._values.items()}
        return {name: v if v.dtype == np.uint8 else v.astype(np.float32) for name, v in made.items()}

    def store(self, name: str, make: Values) -> None:
        """Keep how the tensor called ``name`` is made."""
        self._values[name] = make

    def layer(self, name: str, affine: Callable[[], Affine] | None = None, bias: Values | None = None) -> Layer:
        """Return a linear layer or convolution on codes, followed by an ``affine`` map if one is given.

        Args:
            name: of a :class:`QuantLinear` or :class:`QuantConv2d`.
            affine: makes factor and shift per output channel.
            bias: makes the bias per output channel; the module's own by default.
        """
        module: Any = self.module(name)
        if not isinstance(module, (QuantLinear, QuantConv2d)):
            refuse(name, module, "it is not quantized: it was put in after qvit.quantize, or is of an unknown kind")
        outputs, weights, inputs = module.weight.shape[0], module.weight_quantizer, module.input_quantizer
        offset: Any = inputs.offset  # activations of a layer have one

        def own_bias() -> np.ndarray:
            return np.zeros(outputs) if module.bias is None else wide(module.bias)

        def scale_and_bias() -> Affine:
            scale, shift = wide(weights.scale).reshape(outputs), (bias or own_bias)()
            if affine is None:
                return scale, shift
            factor, added = affine()
            return scale * factor, shift * factor + added

        def codes() -> np.ndarray:
            return pack_codes(weights.codes(module.weight).reshape(outputs, -1).cpu().numpy(), weights.bits)

        self.store(f"{name}.codes", codes)
        self.store(f"{name}.scale", lambda: scale_and_bias()[0])
        self.store(f"{name}.bias", lambda: scale_and_bias()[1])
        self.store(f"{name}.input_scale", lambda: wide(inputs.scale).reshape(1))
        self.store(f"{name}.input_offset", lambda: wide(offset).reshape(1))
        return Layer(name, module.weight[0].numel(), outputs, Bits(weights.bits, inputs.bits))

    def norm(self, name: str, affine: Callable[[], Affine] | None = None) -> Norm | None:
        """Return a norm, followed by an ``affine`` map per channel if one is given; of an ``nn.Identity`` nothing."""
        module = self.module(name)
        if isinstance(module, nn.Identity):
            return None
        kind = _NORMS.get(type(module))
        if kind is None:
            refuse(name, module, "it is no LayerNorm and no RMSNorm")
        width = int(module.normalized_shape[0])

        def weight_and_bias() -> Affine:
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            own = np.ones(width) if weight is None else wide(weight), np.zeros(width) if bias is None else wide(bias)
            if affine is None:
                return own
            factor, shift = affine()
            return own[0] * factor, own[1] * factor + shift

        self.store(f"{name}.weight", lambda: weight_and_bias()[0])
        self.store(f"{name}.bias", lambda: weight_and_bias()[1])
        eps = getattr(module, "eps", None)
        return Norm(name, kind, float(torch.finfo(torch.float32).eps if eps is None else eps))

    def attention(self, name: str, norm: str, layer_scale: str | None = None) -> Attention:
        """Return timm's plain self-attention as :class:`QuantAttention` runs it.

        Args:
            name: of the attention.
            norm: of the norm before it (or after it, as the residual says).
            layer_scale: of the LayerScale that follows the projection, if one does.
        """
        module = self.module(name)
        if type(module) is not QuantAttention:
            refuse(name, module, "it is no attention of qvit's")
        sizes = module.num_heads, module.head_dim
        rectifier = self._rectifier(name, module)
        norms: dict[str, Norm | None] = {}
        folded: dict[str, Callable[[], Affine]] = {}
        for operand in ("query", "key"):
            norm_name = f"{name}.{operand[0]}_norm"
            affine = self._head_affine(f"{name}.{operand}_rectifier") if rectifier == "head" else None
            if isinstance(self.module(norm_name), nn.Identity):
                norms[operand] = None
                if affine is not None:
                    folded[operand] = affine
            else:  # the file has its weight per head and channel
                norms[operand] = self.norm(norm_name, affine or _identity(sizes))
        for operand in OPERANDS:
            self._operand(f"{name}.{operand}", getattr(module, f"{_module_name(operand)}_quantizer"))
        if rectifier == "token":
            for part in ("query_rectifier", "key_rectifier"):
                self._token_rectifier(f"{name}.{part}", sizes)
        return Attention(
            name=name,
            heads=module.num_heads,
            head_dim=module.head_dim,
            scale=float(module.scale),
            norm=self.norm(norm),
            qkv=self.layer(f"{name}.qkv", _qkv_affine(folded, sizes) if folded else None),
            query_norm=norms["query"],
            key_norm=norms["key"],
            rectifier="token" if rectifier == "token" else None,
            query=module.query_quantizer.bits,
            key=module.key_quantizer.bits,
            value=module.value_quantizer.bits,
            map=module.attention_quantizer.bits,
            inner_norm=self.norm(f"{name}.norm"),
            proj=self.layer(f"{name}.proj", self.layer_scale(layer_scale)),
        )

    def mlp(self, name: str, norm: str, layer_scale: str | None = None) -> Mlp:
        """Return an MLP of timm's; arguments as in :meth:`attention`."""
        module = self.module(name)
        kind = _MLPS.get(type(module))
        if kind is None:
            refuse(name, module, f"a packed file knows {', '.join(known.__name__ for known in _MLPS)}")
        if kind == "glu" and module.gate_last:
            kind = "glu_gate_last"
        gated = kind == "swiglu"
        return Mlp(
            name=name,
            kind=kind,
            activation=self.activation(f"{name}.act"),
            norm=self.norm(norm),
            gate=self.layer(f"{name}.fc1_g") if gated else None,
            fc1=self.layer(f"{name}.fc1_x" if gated else f"{name}.fc1"),
            inner_norm=self.norm(f"{name}.norm"),
            fc2=self.layer(f"{name}.fc2", self.layer_scale(layer_scale)),
        )

    def activation(self, name: str) -> str:
        """Return which activation function a module is."""
        module = self.module(name)
        kind = _GELUS.get(module.approximate) if isinstance(module, nn.GELU) else _ACTIVATIONS.get(type(module))
        if kind is None:
            refuse(name, module, f"a packed file knows the activations {', '.join(ACTIVATIONS)}")
        return kind

    def layer_scale(self, name: str | None) -> Callable[[], Affine] | None:
        """Return the affine map of a LayerScale, if there is one."""
        if name is None or isinstance(self.module(name), nn.Identity):
            return None
        module = self.module(name)
        if type(module) is not LayerScale:
            refuse(name, module, "only timm's LayerScale can follow a branch")
        return lambda: (wide(module.gamma), np.zeros(len(module.gamma)))

    def _operand(self, name: str, quantizer: Quantizer) -> None:
        self.store(f"{name}.scale", lambda: wide(quantizer.scale).reshape(-1))
        offset = quantizer.offset
        if offset is not None:
            self.store(f"{name}.offset", lambda: wide(offset).reshape(-1))

    def _rectifier(self, name: str, attention: QuantAttention) -> str | None:
        query, key = attention.query_rectifier, attention.key_rectifier
        kinds = {HeadRectifier: "head", TokenRectifier: "token", nn.Identity: None}
        if type(query) not in kinds or type(key) is not type(query):
            refuse(f"{name}.query_rectifier", query, "it is no rectifier of qvit's, or another than the keys'")
        return kinds[type(query)]

    def _token_rectifier(self, name: str, sizes: Sequence[int]) -> None:
        module = self.module(name)
        self.store(f"{name}.gamma", lambda: wide(module.gamma).reshape(sizes))
        self.store(f"{name}.beta", lambda: wide(module.beta).reshape(sizes))

    def _head_affine(self, name: str) -> Callable[[], Affine]:
        """Return what makes factor and shift ``(H, D)`` of a ``head`` rectifier: ``q~ = factor * q + shift``."""
        rectifier = self.module(name)

        def affine() -> Affine:
            gamma, beta = wide(rectifier.gamma)[:, 0], wide(rectifier.beta)[:, 0]
            mean, variance = wide(rectifier.running_mean)[:, 0], wide(rectifier.running_var)[:, 0]
            divisor = gamma * np.sqrt(variance + EPS)
            if not divisor.all():
                refuse(name, rectifier, "its gamma holds a 0, by which it divides")
            return 1 / divisor, (beta - mean) / divisor

        return affine


def _identity(sizes: Sequence[int]) -> Callable[[], Affine]:
    return lambda: (np.ones(sizes), np.zeros(sizes))


def _qkv_affine(folded: Mapping[str, Callable[[], Affine]], sizes: Sequence[int]) -> Callable[[], Affine]:
    """Return what makes the affine map of qkv, from those of the queries and keys ``(H, D)`` that have one."""

    def affine() -> Affine:
        parts = [folded.get(operand, _identity(sizes))() for operand in ("query", "key", "value")]
        factors, shifts = (np.concatenate([part.reshape(-1) for part in side]) for side in zip(*parts, strict=True))
        return factors, shifts

    return affine


def _module_name(operand: str) -> str:
    """Return what an operand is called in :class:`QuantAttention`."""
    return "attention" if operand == "map" else operand
