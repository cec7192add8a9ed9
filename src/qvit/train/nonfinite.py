"""Where a NaN or an infinity comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from qvit.train.distributed import whole


@torch.no_grad()
def first_non_finite(model: nn.Module, run: Callable[[], object], *, loss_was_finite: bool) -> str:
    """Return what first holds a NaN or an infinity: a weight, the output of a module, or a gradient, as they come.

    An infinity need not reach the loss: a quantizer clips it to its range, and it shows in the gradients alone.

    Args:
        model: the plain model, not its wrapper.
        run: runs it once more on the batch that made the gradients it now has. All processes must do so.
        loss_was_finite: whether only the gradients were not.
    """
    for name, parameter in model.named_parameters():
        if not _finite(whole(parameter)):
            return f"the weights of {name}"
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append(f"the images, as {names[module]} gets them" if not _finite(args) else names[module])

    handles = [module.register_forward_hook(look) for module in names if names[module]]
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
    everywhere: list[list[str]] = gather_object([found])
    for places in everywhere:
        if places:
            return places[0]
    if not loss_was_finite:
        return "the loss itself: every layer's output is finite"
    for name, parameter in reversed(list(model.named_parameters())):  # the backward pass comes from the last layer
        if parameter.grad is not None and not _finite(whole(parameter.grad)):
            return f"the gradient of {name}"
    return "the norm of all gradients, each of them finite"


def _finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_finite(element) for element in value)
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all())
