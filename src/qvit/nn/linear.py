"""Linear and convolution layers with quantized weights and inputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qvit.config import Bits
from qvit.nn.quantizer import Quantizer
from qvit.nn.recompute import recomputed


class QuantLinear(nn.Linear):
    """``nn.Linear`` on codes: inputs with one scale and offset, weights with one scale per output channel.

    A scale an *input* channel would sit inside the sum of the dot product, and no integer product could compute it
    (docs/method.md, section 1). Takes over the float layer's weight and bias.
    """

    def __init__(self, linear: nn.Linear, bits: Bits) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer = Quantizer(bits.activation)
        self.weight_quantizer = Quantizer(bits.weight, (self.out_features, 1), offset=False, batched=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return recomputed(self._product, input)

    def _product(self, input: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)

    def extra_repr(self) -> str:
        """Say the sizes and the bits."""
        return f"{super().extra_repr()}, {_bits(self.weight_quantizer, self.input_quantizer)}"


class QuantConv2d(nn.Conv2d):
    """``nn.Conv2d`` on codes, for the patch embedding; scales as in :class:`QuantLinear`."""

    def __init__(self, conv: nn.Conv2d, bits: Bits) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.input_quantizer = Quantizer(bits.activation)
        self.weight_quantizer = Quantizer(bits.weight, (self.out_channels, 1, 1, 1), offset=False, batched=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, out_channels, H', W')``."""
        return recomputed(self._product, input)

    def _product(self, input: Tensor) -> Tensor:
        x, weight = self.input_quantizer(input), self.weight_quantizer(self.weight)
        overlap = self.kernel_size != self.stride or self.padding != (0, 0) or self.groups > 1 or max(self.dilation) > 1
        if overlap or x.shape[1] != self.in_channels:  # of other images the library says what is wrong
            return self._conv_forward(x, weight, self.bias)
        # Patches that do not overlap make a matrix product. The scale of the images is trained, so the backward pass
        # needs the gradient of the images too, for which the library's convolution takes ten times as long.
        B, C, (p, q) = len(x), self.in_channels, self.kernel_size
        rows, columns = x.shape[-2] // p, x.shape[-1] // q
        patches = x[..., : rows * p, : columns * q].reshape(B, C, rows, p, columns, q).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(B, rows, columns, -1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Say the sizes and the bits."""
        return f"{super().extra_repr()}, {_bits(self.weight_quantizer, self.input_quantizer)}"


def _bits(weight: Quantizer, activation: Quantizer) -> str:
    return f"weight_bits={weight.bits}, activation_bits={activation.bits}"
