"""Size and operations of a model, as the paper's tables count them (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timm.layers import to_2tuple
from torch import nn

from qvit.config import Bits
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer, has_quantizers
from qvit.nn.rectifier import Rectifier
from qvit.quantization.convert import program_of

_FLOAT_BITS = 32
RULE = (
    f"a multiply-add of {_FLOAT_BITS} bits counts 1, one of b bits b/{_FLOAT_BITS}, with b the bits of its wider factor"
)
"""How operations of different widths are added up. A rule, and no statement about time."""


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's parameters by part; a megabyte is 10^6 of them.

    Attributes:
        codes: quantized weights at their true width, each tensor rounded up to a whole byte.
        scales: scales and offsets of all quantizers, float32.
        rectifiers: gamma, beta and running averages, float32. An upper bound: a ``head`` rectifier is affine in
            evaluation and can be folded into the layer before it.
        float32: everything else: biases, norms, tokens, position embedding; all weights of a float model.
        float_bytes: the same model in full precision.
    """

    codes: int
    scales: int
    rectifiers: int
    float32: int
    float_bytes: int

    @property
    def total(self) -> int:
        """Bytes of the model."""
        return self.codes + self.scales + self.rectifiers + self.float32


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates of one image.

    Attributes:
        macs: their number by the bits of the two factors, weight and activation. In the attention products the keys
            and the values stand in the weight's place. Full precision is ``Bits(32, 32)``.
    """

    macs: Mapping[Bits, int]

    @property
    def total(self) -> int:
        """Multiply-accumulates at any width."""
        return sum(self.macs.values())

    @property
    def bit_operations(self) -> int:
        """Each multiply-accumulate weighted with the product of its factors' bits."""
        return sum(count * bits.weight * bits.activation for bits, count in self.macs.items())

    @property
    def float_equivalent(self) -> float:
        """Multiply-adds of float32 that count as much, by the rule :data:`RULE`."""
        return sum(count * max(bits) for bits, count in self.macs.items()) / _FLOAT_BITS


def model_size(model: nn.Module) -> ModelSize:
    """Return the size of a float or quantized model; a quantized one need not be calibrated."""
    codes = scales = rectifiers = float32 = weights = 0
    for module in model.modules():
        numel = sum(t.numel() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if isinstance(module, Quantizer):
            scales += 4 * sum(parameter.numel() for parameter in module.parameters())  # not the record of its bits
        elif isinstance(module, Rectifier):
            rectifiers += 4 * numel
        elif isinstance(module, (QuantLinear, QuantConv2d)):
            codes += -(-module.weight.numel() * module.weight_quantizer.bits // 8)
            weights += module.weight.numel()
            float32 += 4 * (numel - module.weight.numel())
        else:
            float32 += 4 * numel
    return ModelSize(codes, scales, rectifiers, float32, float_bytes=4 * weights + float32)


def operations(model: nn.Module, image_size: int | tuple[int, int]) -> Operations:
    """Count the multiply-accumulates of every linear and convolution layer and of both attention products.

    They are those of the program that the model is lowered to. Norms, softmax, activation functions and additions are
    not counted, nor what is computed once for all images.

    Args:
        model: a float model of a family that qvit knows, or what :func:`qvit.quantize` made of one; it need not be
            calibrated.
        image_size: pixels, one side or (height, width).

    Raises:
        UnsupportedModelError: naming the module that qvit does not know.
        ConfigError: if the model does not take images of this size.
    """
    quantized = has_quantizers(model)
    macs = program_of(model, to_2tuple(image_size)).macs()
    return Operations(macs if quantized else {Bits(_FLOAT_BITS, _FLOAT_BITS): sum(macs.values())})
