"""Scales, offsets and the rectifiers' initial values, from data (docs/method.md, sections 1 and 2)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qvit.errors import ConfigError, DataError, UnsupportedModelError
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.modes import evaluating, switched_off, watching
from qvit.nn.quantizer import Float32Module, Quantizer, code_range, from_codes, to_codes
from qvit.nn.rectifier import Rectifier, RectifierInit
from qvit.quantization.balance import Undo, balance
from qvit.quantization.convert import check_quantized, check_values
from qvit.quantization.images import images_of

WeightInit = Literal["minimum_error", "lsq"]
SAMPLES = 2**17
"""Values kept a quantizer (all its groups and batches together); the fit's error falls with their square root."""
RECTIFIER_IMAGES = 256
_FRACTIONS = tuple(0.84**k for k in range(13))
_FINE_FRACTIONS = tuple(0.95**k for k in range(44))
"""How much of the data's range the fit tries to cover: each side of the mean, or both sides of zero."""
_ROUNDS = 12
_COARSE = 2**13
"""Values a row on which the ranges are tried; the refinement that follows sees all of them."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rectifier_init: RectifierInit = "teacher",
    weight_init: WeightInit = "minimum_error",
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Set every scale, offset and rectifier of a quantized model, in place.

    Passes in floating point: the first, of a few images, finds channels of norms that are far larger than the rest and
    moves their size into the weights behind, which changes no output (docs/method.md, section 10); the second fits the
    rectifiers to the queries and keys, the last collects what enters each quantizer. Then scale and offset minimise the
    mean squared error of the quantized values, for weights and activations alike. Every module is left in the mode it
    was found in; if anything fails, weights, scales and rectifiers are what they were before.

    Args:
        model: what :func:`qvit.quantize` returned.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one; some hundred images are enough.
        rectifier_init: ``"teacher"`` sets gamma and beta so that q~ is as near to q as they allow; ``"unit"`` at 1
            and 0, as the authors' code does; ``"keep"`` leaves them and their statistics as they are.
        weight_init: ``"minimum_error"`` as above; ``"lsq"`` for ``2 mean|w| / sqrt(Qp)`` an output channel (Esser et
            al., 2020), which depends on nothing but the mean.
        report: called with what is done and what there is to do in all: batches to look at and quantizers to fit.

    Raises:
        UnsupportedModelError: if the model has nothing to calibrate, a float layer was put into it, or it is on the
            meta device.
        DataError: if ``batches`` is empty or of anything but images, or they make a NaN or an infinity in the float
            model.
        ConfigError: for an unknown ``rectifier_init`` or ``weight_init``.
    """
    for what, value, known in (
        ("rectifier_init", rectifier_init, get_args(RectifierInit)),
        ("weight_init", weight_init, get_args(WeightInit)),
    ):
        if value not in known:
            raise ConfigError(f"{what} must be {' or '.join(known)}, not {value!r}.")
    quantizers, images = _checked(model, batches)
    advance = _counter(report, len(images) + len(quantizers))
    with _all_or_nothing(model) as undo, evaluating(model), torch.no_grad():
        with switched_off(quantizers.values()):
            balance(model, images, undo)
            _initialize_rectifiers(model, images, rectifier_init)
            samples = _collect(model, images, quantizers, advance)
        for name, quantizer in quantizers.items():
            if quantizer.batched:
                _fit(name, quantizer, samples[name])
                advance()
        for name, module in model.named_modules():
            if isinstance(module, (QuantLinear, QuantConv2d)):
                weight = module.weight.detach().float().flatten(1)
                if weight_init == "lsq":
                    scale = 2 * weight.abs().mean(dim=1) / module.weight_quantizer.high**0.5
                    module.weight_quantizer.set(scale.clamp(min=torch.finfo(scale.dtype).tiny), None)
                else:
                    _fit(f"{name}.weight", module.weight_quantizer, weight)
                advance()


Scale = tuple[Tensor, Tensor | None]
"""Scale and offset of a quantizer, a value per scale that it has."""


@torch.no_grad()
def scales_by_bits(
    model: nn.Module,
    batches: Iterable[Any],
    widths: Sequence[int],
    *,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, Scale]]:
    """Return, by the quantizer's name, what :func:`calibrate` would set it to at each of some numbers of bits.

    The images are looked at once for all of them. Outlier channels of norms are moved into the weights, as by
    :func:`calibrate`; scales are left as they are.

    Args:
        model: what :func:`qvit.quantize` returned, without rectifiers; of whatever bits.
        batches: as of :func:`calibrate`.
        widths: numbers of bits, 2..8 each.
        report: as of :func:`calibrate`.

    Raises:
        UnsupportedModelError: as :func:`calibrate`.
        DataError: as :func:`calibrate`.
    """
    quantizers, images = _checked(model, batches)
    advance = _counter(report, len(images) + len(quantizers))
    with _all_or_nothing(model) as undo, evaluating(model), switched_off(quantizers.values()):
        balance(model, images, undo)
        values = _collect(model, images, quantizers, advance)
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantConv2d)):
            values[f"{name}.weight_quantizer"] = module.weight.detach().float().flatten(1)
    scales: dict[str, dict[int, Scale]] = {}
    for name, quantizer in quantizers.items():
        signed = quantizer.low < 0
        scales[name] = {
            bits: _fitted(name, quantizer, values[name], *code_range(bits, signed=signed)) for bits in widths
        }
        advance()
    return scales


def minimum_error_scale(
    x: Tensor, low: int, high: int, *, with_offset: bool, rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor]:
    """Return scale and offset ``(G,)`` that minimise the squared error of quantizing each row of ``x (G, n)``.

    Takes the best of a coarse grid of ranges (on an even share of the values, where there are many), whose two ends
    move independently if there is an offset, and then alternates between two exact steps: the codes for the present
    scale and offset (rounding), and the scale and offset for the present codes (least squares: a line through the
    pairs of code and value). Each step can only lower the error.
    """
    smallest, largest = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    zero = torch.zeros_like(smallest)
    x_mean = x.mean(dim=1, keepdim=True) if with_offset else zero
    if with_offset:
        starts = [
            (x_mean - below * (x_mean - smallest), x_mean + above * (largest - x_mean))
            for below, above in itertools.product(_FRACTIONS, _FRACTIONS)
        ]
    else:
        step = torch.maximum(largest / max(high, 1), smallest / min(low, -1))
        starts = [(fraction * step * low, fraction * step * high) for fraction in _FINE_FRACTIONS]

    sample = x[:, :: max(1, x.shape[1] // _COARSE)]
    best_error = torch.full_like(zero, torch.inf)
    best_scale, best_offset = torch.ones_like(zero), zero
    # A row of one value only: any positive scale is right (with an offset, the value itself, at code 0), and the
    # value's own size keeps it in floating range.
    size = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
    for first, last in starts:
        constant = last <= first
        scale = torch.where(constant, size, last - first) / (high - low)
        offset = torch.where(constant, x_mean, first - scale * low) if with_offset else zero
        values = from_codes(to_codes(sample, scale, offset, low, high), scale, offset)
        error = (sample - values).square().mean(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)

    scale, offset = best_scale, best_offset
    for _ in range(rounds):
        codes = to_codes(x, scale, offset, low, high)
        code_mean = codes.mean(dim=1, keepdim=True) if with_offset else zero
        spread = (codes - code_mean).square().sum(dim=1, keepdim=True)
        slope = ((codes - code_mean) * (x - x_mean)).sum(dim=1, keepdim=True) / spread
        moves = torch.isfinite(slope) & (slope > 0)
        scale = torch.where(moves, slope, scale)
        offset = torch.where(moves, x_mean - slope * code_mean, offset)
    return scale.squeeze(1), offset.squeeze(1)


def _checked(model: nn.Module, batches: Iterable[Any]) -> tuple[dict[str, Quantizer], list[Tensor]]:
    """Return a model's quantizers by name, and the images on its device, in its type."""
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    if not quantizers:
        raise UnsupportedModelError("This model has no quantizers to calibrate: pass what qvit.quantize returned.")
    check_quantized(model)
    check_values(model)
    parameter = next(model.parameters())
    images = [images_of(batch).to(parameter) for batch in batches]
    images = [batch for batch in images if len(batch)]
    if not images:
        raise DataError("Calibration needs at least one image, and there was none.")
    return quantizers, images


def _counter(report: Callable[[int, int], None] | None, todo: int) -> Callable[[], None]:
    """Return what is to be called whenever one of ``todo`` things is done."""
    done = itertools.count(1)
    return lambda: report(next(done), todo) if report is not None else None


def _fit(name: str, quantizer: Quantizer, values: Tensor) -> None:
    """Set one quantizer from ``values (G, n)``, one row a scale."""
    quantizer.set(*_fitted(name, quantizer, values, quantizer.low, quantizer.high))


def _fitted(name: str, quantizer: Quantizer, values: Tensor, low: int, high: int) -> Scale:
    """Return what a quantizer is set to from ``values (G, n)``, for codes from ``low`` to ``high``."""
    if not torch.isfinite(values).all():
        raise DataError(f"Calibration met a NaN or an infinity at {name}: check the float model and the images.")
    with_offset = quantizer.offset is not None
    scale, offset = minimum_error_scale(values, low, high, with_offset=with_offset)
    return scale, offset if with_offset else None


def _initialize_rectifiers(model: nn.Module, images: list[Tensor], init: RectifierInit) -> None:
    rectifiers = {name: m for name, m in model.named_modules() if isinstance(m, Rectifier)}
    if not rectifiers or init == "keep":
        return
    seen: dict[str, list[Tensor]] = {name: [] for name in rectifiers}
    sample, count = [], 0
    for batch in images:
        sample.append(batch[: RECTIFIER_IMAGES - count])
        count += len(sample[-1])
        if count >= RECTIFIER_IMAGES:
            break
    with switched_off(rectifiers.values()), watching(rectifiers, lambda name, x: seen[name].append(x)):
        for batch in sample:
            model(batch)
    for name, rectifier in rectifiers.items():
        rectifier.fit(torch.cat(seen[name]))
        if init == "unit":
            rectifier.gamma.fill_(1.0)
            rectifier.beta.zero_()


def _collect(
    model: nn.Module, images: list[Tensor], quantizers: dict[str, Quantizer], advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Run the model and return a random sample ``(G, n)`` of what entered each activation quantizer."""
    activations = {name: q for name, q in quantizers.items() if q.batched}
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[Tensor]] = {name: [] for name in activations}

    def keep(name: str, x: Tensor) -> None:
        groups = activations[name].log_scale.numel()
        rows = x.float().movedim(1, 0).reshape(groups, -1) if groups > 1 else x.float().reshape(1, -1)
        wanted = max(1, SAMPLES // (groups * len(images)))
        if rows.shape[1] > wanted:
            chosen = torch.randint(rows.shape[1], (wanted,), generator=generator).to(rows.device)
            rows = rows[:, chosen]
        parts[name].append(rows)

    with watching(activations, keep):
        for batch in images:
            model(batch)
            advance()
    return {name: torch.cat(rows, dim=1) for name, rows in parts.items()}


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[Undo]:
    """Put the scales and rectifiers back as they were if the block fails, and what it has noted down."""
    modules = [module for module in model.modules() if isinstance(module, Float32Module)]
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        with torch.no_grad():
            for parameter, value in undo:
                parameter.copy_(value)
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
        raise
