"""What other authors do at few bits, as rows of the ablation (docs/method.md, section 12).

Their quantizers are simulated in floating point: no packed file can hold such a student. They are here to be compared
from the same model, with the same images, budget and loss, and are rows of ``qvit ablate`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from qvit.errors import UnsupportedModelError
from qvit.models.families import family_of
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.modes import evaluating, switched_off, watching
from qvit.nn.quantizer import Quantizer
from qvit.quantization.balance import fed_layers
from qvit.quantization.calibrate import calibrate, minimum_error_scale
from qvit.quantization.distill import DistillationLoss
from qvit.train.methods import Method

ANNEALED = 0.25
"""Fraction of the training, at its end, in which OFQ's weights are annealed."""
NEAR = 0.005
"""Distance from a rounding border, in steps, within which an annealed weight still learns (OFQ)."""


class StatisticsQuantizer(Quantizer):
    """OFQ's StatsQ for weights ``(out, in)``: ``s = 2 mean|w|`` of each row, no gradient, no level at zero.

    ``w_hat = s (round(n u - 1/2) + 1/2) / n`` with ``u = clip(w / s, -1, 1)`` and ``n = 2^(b-1)``; the gradient of
    every weight is passed on as it is, once ``annealed`` only that of weights near a rounding border.
    """

    def __init__(self, bits: int, rows: int) -> None:
        super().__init__(bits, (rows, 1), offset=False, batched=False)
        del self.log_scale
        self.calibrated, self.annealed = True, False

    def set(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Do nothing: the weights alone make the scale."""

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)

    def _quantize(self, x: Tensor) -> Tensor:
        w = x.float()
        count = 2 ** (self.bits - 1)
        size = 2 * w.detach().abs().mean(dim=1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        place = (w.detach() / size).clamp(-1, 1 - 1e-6) * count
        value = size * ((place - 0.5).round() + 0.5) / count
        if self.annealed:
            border = place.round()
            near = ((place - border).abs() < NEAR) & (border.abs() < count)
            w = torch.where(near, w, w.detach())
        return (value + w - w.detach()).to(x.dtype)


class TokenQuantizer(Quantizer):
    """Inputs with a scale and offset for each position of a token, ``(N, 1)``, as OFQ has them."""


class ChannelLinear(QuantLinear):
    """A layer whose inputs have a scale and offset per channel; its weights are quantized after the fold."""

    def _product(self, input: Tensor) -> Tensor:
        if not self.input_quantizer.enabled:
            return super()._product(input)
        scale = self.input_quantizer.scale
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight * scale) / scale, self.bias)


class ChannelQuantizer(Quantizer):
    """Inputs with a scale and offset per channel."""


class AnnealedLoss(DistillationLoss):
    """Distillation at whose end StatsQ's weights are annealed (OFQ's CGA)."""

    def forward(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss; see :class:`DistillationLoss`."""
        for module in student.modules():
            if isinstance(module, StatisticsQuantizer):
                module.annealed = self.progress >= 1 - ANNEALED
        return super().forward(student, images, labels)


def with_statistics(student: nn.Module) -> None:
    """Give all layers of the blocks StatsQ for their weights."""
    for layer in _block_layers(student):
        layer.weight_quantizer = StatisticsQuantizer(layer.weight_quantizer.bits, layer.out_features)


def with_tokens(student: nn.Module) -> None:
    """Give the inputs of all layers of the blocks a scale per position of a token.

    Raises:
        UnsupportedModelError: for a model whose layers do not all see the same tokens.
    """
    if type(student) is not VisionTransformer or student.pos_embed is None or student.attn_pool is not None:
        raise UnsupportedModelError(
            f"A scale per token needs the same tokens in every layer, which a {type(student).__name__} of this kind "
            "does not have: leave out the rows token-scales, ofq and ofq-annealed."
        )
    covered = 0 if student.no_embed_class else student.num_prefix_tokens
    tokens = student.pos_embed.shape[1] - covered + student.num_prefix_tokens
    for layer in _block_layers(student):
        layer.input_quantizer = TokenQuantizer(layer.input_quantizer.bits, (tokens, 1))


def as_ofq(student: nn.Module) -> None:
    """Exchange quantizers for OFQ's: StatsQ, and a scale per position of a token."""
    with_statistics(student)
    with_tokens(student)


def with_channels(student: nn.Module) -> None:
    """Give the inputs of all layers behind a norm of the blocks a scale per channel: where integers allow it."""
    behind = {id(layer) for _, layers in fed_layers(student) for layer in layers}
    for layer in _block_layers(student):
        if id(layer) in behind:
            layer.__class__ = ChannelLinear
            layer.input_quantizer = ChannelQuantizer(layer.input_quantizer.bits, (layer.in_features,))


@torch.no_grad()
def initialize_channels(student: nn.Module, images: Sequence[Tensor]) -> None:
    """Calibrate a student of :func:`with_channels`: the smallest error of each channel, then of the folded weights."""
    layers = {name: module for name, module in student.named_modules() if isinstance(module, ChannelLinear)}
    quantizers = {name: layer.input_quantizer for name, layer in layers.items()}
    for layer in layers.values():
        layer.input_quantizer = Quantizer(layer.input_quantizer.bits)
    calibrate(student, images)
    for name, layer in layers.items():
        layer.input_quantizer = quantizers[name]
    for name, x in _inputs(student, images[:2]).items():
        quantizer = student.get_submodule(name)
        if isinstance(quantizer, ChannelQuantizer):
            quantizer.set(
                *minimum_error_scale(x.flatten(0, -2).T.contiguous(), quantizer.low, quantizer.high, with_offset=True)
            )
    for layer in layers.values():
        weights = layer.weight_quantizer
        folded = layer.weight * layer.input_quantizer.scale
        weights.set(minimum_error_scale(folded, weights.low, weights.high, with_offset=False)[0])


@torch.no_grad()
def lsq_scales(student: nn.Module, images: Sequence[Tensor]) -> None:
    """Set all scales as the authors of Q-ViT do: ``2 mean|x| / sqrt(Qp)`` (LSQ), offsets of 0.

    Of a layer's weights together, and of what the first batch brings to each quantizer of activations. Where the
    weights take a scale per input channel, the mean is that of the folded weights.
    """
    for name, x in _inputs(student, images[:1]).items():
        quantizer: Any = student.get_submodule(name)
        if isinstance(quantizer, ChannelQuantizer):
            size = x.abs().flatten(0, -2).mean(dim=0)
        elif quantizer.log_scale.numel() > 1:  # per head
            size = x.abs().mean(dim=(0, 2, 3))
        else:
            size = x.abs().mean()
        scale = 2 * size / math.sqrt(quantizer.high)
        quantizer.set(scale.clamp(min=1e-6), torch.zeros_like(scale))
    for layer in student.modules():
        if isinstance(layer, (QuantLinear, QuantConv2d)):
            quantizer, weight = layer.weight_quantizer, layer.weight.detach()
            if isinstance(layer, ChannelLinear):
                weight = weight * layer.input_quantizer.scale
            scale = 2 * weight.abs().mean() / math.sqrt(quantizer.high)
            quantizer.set(scale.expand(quantizer.log_scale.shape))


RIVALS: dict[str, Method] = {
    "statsq": Method("StatsQ weights", rectified=False, guided=False, adapt=with_statistics),
    "token-scales": Method("scale per token", rectified=False, guided=False, adapt=with_tokens),
    "channel-scales": Method(
        "scale per channel", rectified=False, guided=False, adapt=with_channels, initialize=initialize_channels
    ),
    "ofq": Method("OFQ's quantizers", rectified=False, guided=False, adapt=as_ofq),
    "ofq-annealed": Method("OFQ's, annealed", rectified=False, guided=False, adapt=as_ofq, loss=AnnealedLoss),
    "authors": Method("authors' baseline", rectified=False, guided=False, adapt=with_channels, initialize=lsq_scales),
    "authors-rectify": Method(
        "authors' + IRM", rectified=True, guided=False, adapt=with_channels, initialize=lsq_scales, against="authors"
    ),
    "authors-distill": Method(
        "authors' + DGD", rectified=False, guided=True, adapt=with_channels, initialize=lsq_scales, against="authors"
    ),
    "authors-q-vit": Method(
        "authors' Q-ViT", rectified=True, guided=True, adapt=with_channels, initialize=lsq_scales, against="authors"
    ),
}  # fmt: skip
"""Methods of the ablation beside :data:`qvit.train.methods.METHODS`. IRM is the authors' here: per token, from unit."""


def _block_layers(student: nn.Module) -> list[QuantLinear]:
    """Return the layers whose bits are few: those inside of blocks."""
    blocks = family_of(student).blocks(student)
    return [module for block in blocks for module in block.modules() if isinstance(module, QuantLinear)]


def _inputs(student: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what enters each quantizer of activations when nothing is quantized, by its name."""
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, Quantizer)}
    seen: dict[str, list[Tensor]] = {}
    activations = {name: quantizer for name, quantizer in quantizers.items() if quantizer.batched}
    device = next(student.parameters()).device
    with (
        evaluating(student),
        switched_off(quantizers.values()),
        watching(activations, lambda name, x: seen.setdefault(name, []).append(x.float())),
    ):
        for images in batches:
            student(images.to(device))
    return {name: torch.cat(parts) for name, parts in seen.items()}
