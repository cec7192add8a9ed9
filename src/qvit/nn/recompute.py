"""What the backward pass computes again instead of keeping: memory for little time.

A quantized layer has a float copy more of all that enters a product than its float original: the value and, beside it,
the value on the grid. The second is a few operations away from the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, random: bool = False) -> Tensor:
    """Return ``function(*inputs)``, of which eager mode keeps the inputs alone for the backward pass.

    The backward pass runs ``function`` again as far as the last tensor that it needs: of a product, its operands are
    computed again and the product itself is not. A compiler chooses for itself what to keep within ``function``.

    Args:
        function: has no side effects; may use parameters that are not among ``inputs``.
        inputs: its arguments.
        random: whether it draws random numbers, which then have to be the same again.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return _checkpoint(function, *inputs, preserve_rng_state=random)


def recomputed_when_compiled(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``function(*inputs)``, which a compiler is told to compute again in the backward pass, not to keep."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return _checkpoint(function, *inputs, preserve_rng_state=False)
    return function(*inputs)


def in_backward_pass() -> bool:
    """Return whether a backward pass runs this: gradient checkpointing then computes again what was computed before.

    What a module counts or averages it must not count a second time there. A compiler takes care of that by itself.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _checkpoint(function: Callable[..., Tensor], *inputs: Any, preserve_rng_state: bool) -> Tensor:
    result: Tensor = checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state, determinism_check="none"
    )
    return result
