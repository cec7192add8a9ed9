"""A model for a while: in evaluation, compiled, with modules off or watched, and everything as it was after that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put ``models`` in evaluation mode; after that every module of theirs is in the mode that it was found in."""
    found = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in found:
            module.training = training


@contextmanager
def switched_off(modules: Iterable[Any]) -> Iterator[None]:
    """Let quantizers or rectifiers pass on what they get; after that each is on or off as it was found."""
    found = [(module, module.enabled) for module in modules]
    for module, _ in found:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in found:
            module.enabled = enabled


@contextmanager
def compiled(*models: nn.Module, wanted: bool) -> Iterator[None]:
    """Let ``models`` run compiled within the block, if that is ``wanted``; after that each runs as it did before."""
    if wanted:
        torch.compiler.reset()  # of earlier models nothing is left: a class is compiled for so many of them and no more
    found = [model._compiled_call_impl for model in models]
    for model in models if wanted else ():
        model.compile()
    try:
        yield
    finally:
        for model, call in zip(models, found, strict=True):
            model._compiled_call_impl = call


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` with what enters each of ``modules`` while the block runs the model.

    Compiled code does not notice it.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
