"""Weights from a file: each is checked for what the model needs before any is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import CheckpointError
from qvit.files import shown
from qvit.nn.quantizer import BITS, Quantizer


def fitting(weights: Mapping[str, Any], model: nn.Module, complaint: str) -> dict[str, Tensor]:
    """Return ``weights`` in the dtypes of ``model``, which may be on the ``meta`` device.

    The record of a quantizer's bits, which checkpoints of version 1 lack, is that of the model.

    Raises:
        CheckpointError: ``complaint``, and the name of the first weight that is absent, of another shape or kind, too
            many, or holds what no model computes with: a NaN, an infinity, a scale that is none.
    """
    found: dict[str, Tensor] = {}
    records = {f"{name}.{BITS}": m.bits for name, m in model.named_modules() if isinstance(m, Quantizer)}
    for name, needed in model.state_dict().items():
        if name in records and name not in weights:
            found[name] = torch.tensor(records[name], dtype=needed.dtype)
            continue
        if name not in weights:
            raise CheckpointError(f"{complaint}: {name} is absent.")
        value = weights[name]
        why = _why_unfit(value, needed)
        if why is None:
            found[name] = value.detach().to(needed.dtype)
            why = _why_unusable(name, found[name])
            if name in records and int(found[name]) != records[name]:
                why = f"is {int(found[name])}, the model is to have {records[name]}"
        if why is not None:
            raise CheckpointError(f"{complaint}: {name} {why}.")
    for name in weights:
        if name not in found:
            raise CheckpointError(f"{complaint}: the model has no {shown(name)}.")
    return found


def _why_unusable(name: str, value: Tensor) -> str | None:
    """Return what is wrong with a weight's values, if anything is."""
    if name.endswith(".log_scale"):
        scale = value.exp()
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            return "is no usable scale: it is damaged, or was never calibrated"
    if not torch.isfinite(value).all():
        return "holds a NaN or an infinity"
    if name.endswith("_rectifier.running_var") and bool((value < 0).any()):
        return "holds a variance below 0"
    if name.endswith("_rectifier.gamma") and not bool(value.all()):
        return "holds a 0, by which a rectifier divides"
    return None


def _why_unfit(value: Any, needed: Tensor) -> str | None:
    """Return why a weight is not one that the model has, if it is not."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"is {shown(value)} and no tensor"
    if value.layout is not torch.strided or value.is_nested:
        return "is sparse, and must be dense"
    if value.is_quantized:
        return "is one of PyTorch's quantized tensors, and must be floating"
    if value.device.type == "meta":
        return "is on the meta device and has no values"
    if value.is_complex():
        return "is complex"
    if value.is_floating_point() != needed.is_floating_point():
        return f"is of type {_dtype(value)}, the model needs {_dtype(needed)}"
    if value.shape != needed.shape:
        return f"has shape {tuple(value.shape)}, the model needs {tuple(needed.shape)}"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "repeats fewer values than it has places for"
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
