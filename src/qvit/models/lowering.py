"""A quantized model becomes a program and its tensors: what all families have in common.

A family (one file each beside this one) walks its model once and names modules; the tensors are functions that nobody
calls where only the program is wanted. What evaluation applies to every image alike is folded into the layer before it,
in float64 and rounded once: LayerScale into the projections, a ``head`` rectifier into queries and keys
(docs/method.md, section 5). What a file means stands in :mod:`qvit.runtime.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import timm.layers
import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from qvit.config import Bits
from qvit.errors import UnsupportedModelError
from qvit.format.branches import Mlp
from qvit.format.codes import pack_codes
from qvit.format.ops import ACTIVATIONS, Layer, Norm
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer

NORMS: dict[type, str] = {
    nn.LayerNorm: "layer",
    timm.layers.LayerNorm: "layer",
    timm.layers.LayerNormFp32: "layer",
    nn.RMSNorm: "rms",
    timm.layers.RmsNorm: "rms",
    timm.layers.RmsNormFp32: "rms",
}
"""What each class of norm is called in a file."""
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
    raise UnsupportedModelError(f"Cannot quantize {name} ({type(module).__name__}): {why}.")


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
        self.parts: dict[str, Sequence[str]] = {}
        """Names of the modules that make up each layer."""
        self.said: set[str] = set()
        """Names of the modules that the program speaks of."""
        self._values: dict[str, Values] = {}

    def module(self, name: str) -> Any:
        """Return the module called ``name``."""
        self.said.add(name)
        return self.model.get_submodule(name)

    def known(self, name: str, *kinds: type[nn.Module]) -> Any:
        """Return the module called ``name``, which must be of one of these classes, and of no subclass.

        Raises:
            UnsupportedModelError: naming it and the classes.
        """
        module = self.module(name)
        if type(module) not in kinds:
            refuse(name, module, f"a packed file knows {', '.join(kind.__name__ for kind in kinds)}")
        return module

    def tensors(self) -> dict[str, np.ndarray]:
        """Return every tensor of the file, float32 or codes."""
        made = {name: make() for name, make in self._values.items()}
        return {name: v if v.dtype == np.uint8 else v.astype(np.float32) for name, v in made.items()}

    def store(self, name: str, make: Values) -> None:
        """Keep how the tensor called ``name`` is made."""
        self._values[name] = make

    def layer(
        self,
        name: str,
        affine: Callable[[], Affine] | None = None,
        bias: Values | None = None,
        of: Sequence[str] | None = None,
    ) -> Layer:
        """Return a linear layer or convolution on codes, followed by an ``affine`` map if one is given.

        Args:
            name: of a :class:`QuantLinear` or :class:`QuantConv2d`.
            affine: makes factor and shift per output channel.
            bias: makes the bias per output channel; the module's own by default.
            of: the modules that make up the layer, one after the other, where it is not the one called ``name``. They
                share one input quantizer.
        """
        self.parts[name] = of or (name,)
        modules: list[Any] = [self.module(part) for part in self.parts[name]]
        for part, module in zip(self.parts[name], modules, strict=True):
            if not isinstance(module, (QuantLinear, QuantConv2d)):
                refuse(part, module, "it is not quantized: it was put in after qvit.quantize, or is of an unknown kind")
            if module.weight_quantizer.bits != modules[0].weight_quantizer.bits:
                refuse(part, module, f"it is one layer with {self.parts[name][0]}, whose weights have other bits")
            if module.input_quantizer is not modules[0].input_quantizer:
                refuse(part, module, f"it is one layer with {self.parts[name][0]}, whose input has another quantizer")
        inputs: Quantizer = modules[0].input_quantizer
        offset: Any = inputs.offset  # activations of a layer have one
        outputs, bits = sum(len(module.weight) for module in modules), modules[0].weight_quantizer.bits

        def own_bias() -> np.ndarray:
            biases = [np.zeros(len(m.weight)) if m.bias is None else wide(m.bias) for m in modules]
            return np.concatenate(biases)

        def scale_and_bias() -> Affine:
            scale = np.concatenate([wide(module.weight_quantizer.scale).reshape(-1) for module in modules])
            shift = (bias or own_bias)()
            if affine is None:
                return scale, shift
            factor, added = affine()
            return scale * factor, shift * factor + added

        def codes() -> np.ndarray:
            rows = torch.cat([module.weight_quantizer.codes(module.weight).flatten(1) for module in modules])
            return pack_codes(rows.cpu().numpy(), bits)

        self.store(f"{name}.codes", codes)
        self.store(f"{name}.scale", lambda: scale_and_bias()[0])
        self.store(f"{name}.bias", lambda: scale_and_bias()[1])
        self.store(f"{name}.input_scale", lambda: wide(inputs.scale).reshape(1))
        self.store(f"{name}.input_offset", lambda: wide(offset).reshape(1))
        return Layer(name, modules[0].weight[0].numel(), outputs, Bits(bits, inputs.bits))

    def norm(self, name: str, affine: Callable[[], Affine] | None = None) -> Norm | None:
        """Return a norm, followed by an ``affine`` map per channel if one is given; of an ``nn.Identity`` nothing."""
        module = self.module(name)
        if isinstance(module, nn.Identity):
            return None
        kind = NORMS.get(type(module))
        if kind is None:
            refuse(name, module, "it is no LayerNorm and no RMSNorm")
        width = int(module.normalized_shape[0])

        def weight_and_bias() -> Affine:
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            values = np.ones(width) if weight is None else wide(weight), np.zeros(width) if bias is None else wide(bias)
            if affine is None:
                return values
            factor, shift = affine()
            return values[0] * factor, values[1] * factor + shift

        self.store(f"{name}.weight", lambda: weight_and_bias()[0])
        self.store(f"{name}.bias", lambda: weight_and_bias()[1])
        eps = getattr(module, "eps", None)
        return Norm(name, kind, float(torch.finfo(torch.float32).eps if eps is None else eps))

    def mlp(self, name: str, norm: str, layer_scale: str | None = None) -> Mlp:
        """Return an MLP of timm's.

        Args:
            name: of the MLP.
            norm: of the norm before it (or after it, as the residual says).
            layer_scale: of the LayerScale or the parameter that its output is multiplied with, if there is one.
        """
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
        kind = _GELUS.get(module.approximate) if type(module) is nn.GELU else _ACTIVATIONS.get(type(module))
        if kind is None:
            refuse(name, module, f"a packed file knows the activations {', '.join(ACTIVATIONS)}")
        return kind

    def layer_scale(self, name: str | None) -> Callable[[], Affine] | None:
        """Return the affine map of a LayerScale or of a parameter, if there is one."""
        if name is None:
            return None
        owner, _, attribute = name.rpartition(".")
        found = getattr(self.module(owner), attribute)
        self.said.add(name)
        if found is None or isinstance(found, nn.Identity):
            return None
        gamma = found if isinstance(found, nn.Parameter) else getattr(found, "gamma", None)
        if type(found) not in (LayerScale, nn.Parameter) or gamma is None:
            refuse(name, found, "only timm's LayerScale can follow a branch")
        return lambda: (wide(gamma), np.zeros(len(gamma)))
