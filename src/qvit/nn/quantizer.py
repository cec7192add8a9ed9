"""The quantizer: LSQ/LSQ+ arithmetic (docs/method.md, section 1), written once for weights and activations.

Sources: Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+", 2020; for the scale kept as
its logarithm, Jain et al., "Trained Quantization Thresholds", MLSys 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import ConfigError, UncalibratedError
from qvit.nn.recompute import recomputed_when_compiled

BITS = "code_bits"
"""Entry of a quantizer's state dict: for how many bits its scale was made."""


def code_range(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """Return the smallest and the largest code: ``[-2^(b-1), 2^(b-1) - 1]``, or ``[0, 2^b - 1]`` if unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def to_codes(x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
    """Return ``round(clip((x - offset) / scale, low, high))``, whole numbers in ``x``'s floating dtype.

    Rounding is half to even. ``scale`` and ``offset`` broadcast against ``x``.
    """
    centred = x if offset is None else x - offset
    return torch.round(torch.clamp(centred / scale, low, high))


def from_codes(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return ``scale * codes + offset``, the value that the codes stand for."""
    values = codes * scale
    return values if offset is None else values + offset


class _FakeQuantize(torch.autograd.Function):
    """``from_codes(to_codes(x))`` with the LSQ+ gradients; saves ``x`` alone and recomputes the codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return from_codes(to_codes(x, scale, offset, low, high), scale, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scale, offset = ctx.saved_tensors
        v = (x if offset is None else x - offset) / scale
        clipped = torch.clamp(v, ctx.low, ctx.high)
        inside = v == clipped
        grad_x = torch.where(inside, grad, 0)
        # d x_hat / d scale is round(v) - v where the value passes, and the code itself where it was clipped. In place:
        # these temporaries are as large as x, and the peak of a step's memory lies here.
        slope = clipped.round_().sub_(v.masked_fill_(~inside, 0))
        grad_scale = _sum_to(slope.mul_(grad), scale.shape) * ctx.gradient_scale
        grad_offset = None
        if offset is not None:
            grad_offset = _sum_to(grad - grad_x, offset.shape) * ctx.gradient_scale
        return grad_x, grad_scale, grad_offset, None, None, None


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Return ``x.sum_to_size(shape)``; the compiler then computes it in the loop that makes ``x``."""
    if shape.numel() == 1:
        return x.sum().reshape(shape)
    if shape[-1] == 1:  # row by row first: vectors along a row, threads across rows
        x = x.sum(dim=-1, keepdim=True)
    return x.sum_to_size(shape)


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, gradient_scale: float = 1.0
) -> Tensor:
    """Quantize ``x`` and return the value of its codes, differentiable by the straight-through estimator.

    Gradients, with ``v = (x - offset) / scale``: of ``x``, 1 inside the code range and 0 outside; of ``scale``,
    ``round(v) - v`` inside and the clipped code outside; of ``offset``, 0 inside and 1 outside; the last two are
    multiplied by ``gradient_scale`` (LSQ, equations 3 and 5; LSQ+, equation 4).

    Args:
        x: floating values of any shape.
        scale: positive, broadcasts against ``x``.
        offset: broadcasts against ``x``, or ``None`` for a symmetric or unsigned quantizer.
        low: smallest code.
        high: largest code.
        gradient_scale: LSQ's ``g = 1 / sqrt(numel * Qp)``.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, offset, low, high, gradient_scale)
    return result


class Float32Module(nn.Module):
    """A module of the quantized model alone, whose parameters move between devices but never leave float32.

    ``model.half()`` or ``model.to(torch.bfloat16)`` would round trained scales for good; statistics of this size cost
    nothing in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


class Quantizer(Float32Module):
    """Fake-quantizes a tensor with a trained scale, and a trained offset if asked for.

    The scale is ``exp(log_scale)``, positive by construction; the optimizer then moves it in proportion to its size,
    which an Adam-like step on the scale itself would not do. Until :func:`qvit.calibrate` (or a state dict that
    holds scales) has set it, it is NaN and ``forward`` raises. The state dict says the bits, and one that says others
    is refused.

    Args:
        bits: 2..8.
        shape: shape of scale and offset, broadcast against the input: ``()`` for one per tensor, ``(H, 1, 1)`` for one
            per head of ``(B, H, N, D)``, ``(out, 1)`` for one per output channel.
        signed: codes in ``[-2^(b-1), 2^(b-1) - 1]``, otherwise in ``[0, 2^b - 1]``.
        offset: whether an offset ``z`` is trained.
        batched: whether the input's first dimension is the batch (activations) or not (weights).
    """

    code_bits: Tensor

    def __init__(
        self, bits: int, shape: tuple[int, ...] = (), *, signed: bool = True, offset: bool = True, batched: bool = True
    ) -> None:
        super().__init__()
        self.bits, self.batched = bits, batched
        self.low, self.high = code_range(bits, signed=signed)
        self.log_scale = nn.Parameter(torch.full(shape, math.nan))
        self.offset = nn.Parameter(torch.zeros(shape)) if offset else None
        self.register_buffer(BITS, torch.tensor(bits, dtype=torch.uint8))
        self.calibrated = False
        self.enabled = True

    @property
    def scale(self) -> Tensor:
        """The step between two codes, positive, float32."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Set scale and offset (any shape with as many elements) and mark the quantizer as calibrated."""
        self.log_scale.copy_(scale.reshape(self.log_scale.shape).log())
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset.reshape(self.offset.shape))
        self.calibrated = bool(torch.isfinite(self.log_scale).all())

    def change(self, bits: int, scale: Tensor, offset: Tensor | None = None) -> None:
        """Take other bits, and the scale and offset that were made for them."""
        self.bits = bits
        self.low, self.high = code_range(bits, signed=self.low < 0)
        self.code_bits.fill_(bits)
        self.set(scale, offset)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid of the codes, in ``x``'s dtype; the arithmetic is float32 (or wider if ``x`` is).

        Raises:
            UncalibratedError: if no scale has been set.
        """
        if not self.enabled:  # calibration looks at float values; a Python attribute, so that nothing depends on data
            return x
        if not self.calibrated:
            raise UncalibratedError(
                "This model's quantizers have no scales yet: call qvit.calibrate(model, batches), or load a trained "
                "state dict, before running it."
            )
        # Left alone, the compiler would keep the input and the result of every quantizer for the backward pass.
        return recomputed_when_compiled(self._quantize, x)

    def _quantize(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return fake_quantize(wide, self.scale, self.offset, self.low, self.high, self._gradient_scale(x)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of ``x`` (int16, so that unsigned 8-bit ones fit)."""
        return to_codes(x.float(), self.scale, self.offset, self.low, self.high).to(torch.int16)

    def _gradient_scale(self, x: Tensor) -> float:
        # numel counts what shares one scale within one image: with the batch counted too, g and so the step would
        # depend on how a batch is split over processes or accumulated.
        numel = (x[0].numel() if self.batched else x.numel()) / self.log_scale.numel()
        return 1.0 / math.sqrt(numel * self.high)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bits = state_dict.get(f"{prefix}{BITS}")
        if bits is not None and int(bits) != self.bits:
            raise ConfigError(
                f"The state dict has {int(bits)} bits at {prefix.rstrip('.') or 'this quantizer'}, the model "
                f"{self.bits}: quantize the model with the bits that the state dict was trained with."
            )
        # Checkpoints of the first version do not record the bits.
        super()._load_from_state_dict({f"{prefix}{BITS}": self.code_bits, **state_dict}, prefix, *args)
        self.calibrated = bool(torch.isfinite(self.log_scale).all())

    def extra_repr(self) -> str:
        """Say the bits and how many scales there are."""
        sign = "signed" if self.low else "unsigned"
        return f"{self.bits} bits, {sign}, scales={self.log_scale.numel()}, offset={self.offset is not None}"


def has_quantizers(model: nn.Module) -> bool:
    """Say whether a part of ``model`` is quantized, as what :func:`qvit.quantize` returns is."""
    return any(isinstance(module, Quantizer) for module in model.modules())
