"""Noise, clipped values, unused codes and outliers of each quantizer (docs/method.md, section 6)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvit.config import MAX_BITS
from qvit.errors import DataError, UncalibratedError
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.modes import watching
from qvit.nn.quantizer import Quantizer, from_codes, to_codes

OUTLIER = 6.0
"""A channel is an outlier if its range is this many times that of the median channel with the same scale."""
_OPERANDS = ("query_quantizer", "key_quantizer", "value_quantizer", "attention_quantizer")


@dataclass(frozen=True)
class QuantizerNoise:
    """What one quantizer did to what entered it.

    Attributes:
        name: of the quantizer in the model: ``blocks.0.mlp.fc1.input_quantizer``.
        bits: of its codes.
        snr: signal to quantization noise in dB: ``10 log10`` of the values' squared distance from their mean by that
            from their quantized values; ``None`` where nothing was lost.
        clipped: fraction of the values that lie outside the range of the codes.
        unused: codes that no value had, of all its groups with a scale of their own (heads); of weights, of all rows
            together.
        codes: how many codes there are.
        outliers: channels whose range is more than :data:`OUTLIER` times the median's, by number, head after head;
            ``None`` of weights and attention maps, which have no channels.
        override: what gives it 8 bits, for ``--override``; ``None`` where it has them.
    """

    name: str
    bits: int
    snr: float | None
    clipped: float
    unused: int
    codes: int
    outliers: list[int] | None
    override: str | None

    @property
    def complaints(self) -> str:
        """What is the matter with it beside its few bits, for people; may be empty."""
        found = [f"clipped {100 * self.clipped:.1f} %"] if self.clipped >= 0.01 else []
        found += [f"unused codes {self.unused} of {self.codes}"] if self.unused else []
        found += [f"outlier channels {len(self.outliers)}"] if self.outliers else []
        return ", ".join(found)


class ModelNoise:
    """Adds up what the quantizers of a model do while it runs; what was seen is kept as sums and counts only.

    Args:
        model: quantized and calibrated.

    Raises:
        UncalibratedError: if it has no scales yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}
        for name, quantizer in quantizers.items():
            if not quantizer.calibrated:
                raise UncalibratedError(f"{name} has no scale yet: call qvit.calibrate(model, batches) first.")
        self._activations = {name: quantizer for name, quantizer in quantizers.items() if quantizer.batched}
        self._sums = {name: _Sums(name, quantizer) for name, quantizer in quantizers.items()}
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, (QuantLinear, QuantConv2d)):
                    self._sums[f"{name}.weight_quantizer"].add(module.weight)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take in what enters the activations' quantizers while the block runs the model."""
        with watching(self._activations, lambda name, x: self._sums[name].add(x)):
            yield

    def result(self) -> list[QuantizerNoise]:
        """Return the quantizers in the order of the model's modules; those that nothing entered are left out."""
        return [
            QuantizerNoise(**sums.result(), override=override_for(self.model, name))
            for name, sums in self._sums.items()
            if sums.values
        ]


def worst(noises: Sequence[QuantizerNoise], count: int) -> list[QuantizerNoise]:
    """Return the quantizers with the least signal to noise, the worst first."""
    lossy = [noise for noise in noises if noise.snr is not None]
    return sorted(lossy, key=lambda noise: noise.snr)[:count]  # type: ignore[arg-type, return-value]


def override_for(model: nn.Module, name: str) -> str | None:
    """Return ``PATTERN=BITS`` that gives the quantizer called ``name`` 8 bits and leaves its layer's others alone.

    ``None`` where it has 8 bits.
    """
    path, _, part = name.rpartition(".")
    quantizer: Any = model.get_submodule(name)
    if quantizer.bits == MAX_BITS:
        return None
    if part in _OPERANDS:
        return f"{name}={MAX_BITS}"
    layer: Any = model.get_submodule(path)
    if part == "weight_quantizer":
        return f"{path}={MAX_BITS}/{layer.input_quantizer.bits}"
    shared = getattr(model.get_submodule(path.rpartition(".")[0]), "k_proj", None)
    if shared is not None and shared.input_quantizer is quantizer:  # three projections with one input
        path = f"{path.rpartition('.')[0]}.[qkv]_proj"
    return f"{path}={layer.weight_quantizer.bits}/{MAX_BITS}"


class _Sums:
    """Sums and counts of what entered one quantizer."""

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        self.name, self.quantizer = name, quantizer
        self.values = self.clipped = 0
        self.total = self.squares = self.noise = 0.0
        self.heads = quantizer.log_scale.numel() if quantizer.batched else 1
        self.counts = torch.zeros(self.heads, 2**quantizer.bits, dtype=torch.int64)
        self.smallest: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in the values of a batch."""
        quantizer, x = self.quantizer, x.float()
        scale, offset = quantizer.scale, quantizer.offset
        codes = to_codes(x, scale, offset, quantizer.low, quantizer.high)
        scaled = (x if offset is None else x - offset) / scale
        self.clipped += int(((scaled < quantizer.low) | (scaled > quantizer.high)).sum())
        self.noise += float((from_codes(codes, scale, offset) - x).square().sum(dtype=torch.float64))
        self.total += float(x.sum(dtype=torch.float64))
        self.squares += float(x.square().sum(dtype=torch.float64))
        self.values += x.numel()
        if not math.isfinite(self.squares):
            raise DataError(f"What enters {self.name} holds a NaN or an infinity: check the model and the images.")
        levels = self.counts.shape[1]
        head = torch.arange(self.heads, device=x.device).view(-1, 1, 1) if self.heads > 1 else 0
        number = (codes - quantizer.low).long() + head * levels
        self.counts += torch.bincount(number.flatten(), minlength=self.counts.numel()).view_as(self.counts).cpu()
        if quantizer.batched and not self.name.endswith("attention_quantizer"):
            self._stretch(x)

    def _stretch(self, x: Tensor) -> None:
        """Take in the ranges of the channels ``(groups with a scale, channels)``."""
        if self.heads > 1:  # (B, H, N, D)
            smallest, largest = x.amin(dim=(0, 2)), x.amax(dim=(0, 2))
        elif x.ndim == 4 and self.name.startswith("patch_embed."):  # images (B, C, H, W)
            smallest, largest = x.amin(dim=(0, 2, 3))[None], x.amax(dim=(0, 2, 3))[None]
        else:
            rows = x.flatten(0, -2)
            smallest, largest = rows.amin(dim=0)[None], rows.amax(dim=0)[None]
        first = self.smallest is None or self.largest is None
        self.smallest = smallest if first else torch.minimum(self.smallest, smallest)  # type: ignore[arg-type]
        self.largest = largest if first else torch.maximum(self.largest, largest)  # type: ignore[arg-type]

    def result(self) -> dict[str, Any]:
        signal = self.squares - self.total**2 / self.values
        lossless = self.noise <= 0 or signal <= 0
        outliers = None
        if self.smallest is not None and self.largest is not None:
            ranges = self.largest - self.smallest
            # Half of the channels are at or below the lower median, so that no outlier of few channels is its own one.
            far = ranges > OUTLIER * ranges.median(dim=-1, keepdim=True).values
            outliers = far.flatten().nonzero().flatten().tolist()
        return {
            "name": self.name,
            "bits": self.quantizer.bits,
            "snr": None if lossless else 10 * math.log10(signal / self.noise),
            "clipped": self.clipped / self.values,
            "unused": int((self.counts == 0).sum()),
            "codes": self.counts.numel(),
            "outliers": outliers,
        }
