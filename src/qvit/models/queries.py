"""Queries, keys and attention maps of a model while it runs (docs/method.md, sections 3 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from qvit.models.families import ATTENTIONS
from qvit.nn.attention import QuantAttention
from qvit.nn.pool import QuantAttentionPool


class Place(NamedTuple):
    """Where a module is: in which other one, and by what name."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> Any:
        """The module that is there now."""
        return getattr(self.parent, self.name)


def attention_layers(model: nn.Module) -> list[Any]:
    """Return the self-attention modules of a float or quantized model, in the order they run; not the poolings."""
    return [place.module for place in attention_places(model)]


def attention_places(model: nn.Module) -> list[Place]:
    """Return where the modules of :func:`attention_layers` are."""
    return [
        Place(parent, name) for parent in model.modules() for name, child in parent.named_children() if _is_layer(child)
    ]


def _is_layer(module: nn.Module) -> bool:
    kind = ATTENTIONS.get(type(module), type(module))
    return issubclass(kind, QuantAttention) and not issubclass(kind, QuantAttentionPool)


def run_with_queries(model: nn.Module, images: Tensor) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Return ``model(images)``, and the queries and keys of every attention layer, ``(B, H, N, D)`` each.

    Of a float model they are what enters the attention product, after norm and rotation; of a quantized one the
    rectified q~ and k~ before they are quantized. Where attention stays inside windows, B counts the windows, those of
    an image one after the other.

    Args:
        model: a float or quantized vision transformer, maybe compiled or in a wrapper such as DDP.
        images: ``(B, C, H, W)``.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    watched = {"query_rectifier": recording(queries), "key_rectifier": recording(keys)}
    return run_watched(model, images, watched, attention_places(model)), queries, keys


def run_with_maps(model: nn.Module, images: Tensor) -> tuple[Any, list[Tensor]]:
    """Return ``model(images)``, and the map of every attention layer before its quantizer, ``(B, H, N, N)`` each.

    Arguments and B as for :func:`run_with_queries`.
    """
    maps: list[Tensor] = []
    watched = {"attention_quantizer": recording(maps, output=False)}
    return run_watched(model, images, watched, attention_places(model)), maps


class Attended(NamedTuple):
    """What a model gave, and what its attention layers had on the way: as :func:`run_with_queries` and the maps."""

    output: Any
    queries: list[Tensor]
    keys: list[Tensor]
    maps: list[Tensor]


def run_with_attention(model: nn.Module, images: Tensor) -> Attended:
    """Return what :func:`run_with_queries` and :func:`run_with_maps` do, of one run."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    maps: list[Tensor] = []
    watched = {
        "query_rectifier": recording(queries),
        "key_rectifier": recording(keys),
        "attention_quantizer": recording(maps, output=False),
    }
    return Attended(run_watched(model, images, watched, attention_places(model)), queries, keys, maps)


Watcher = Callable[[nn.Module], nn.Module]
"""Makes the module that stands in the place of another one while a model runs."""


def recording(values: list[Tensor], *, output: bool = True) -> Watcher:
    """Return a watcher that appends what modules give, or what they get if not ``output``, to ``values``."""
    return partial(_Recorded, values=values, output=output)


def run_watched(model: nn.Module, images: Tensor, watched: Mapping[str, Watcher], places: Sequence[Place]) -> Any:
    """Return ``model(images)`` while watchers stand in the place of modules of its attention layers.

    In the place of a float attention stands one that computes the same through such modules; nothing of it is left
    afterwards. Hooks would do the same in eager mode, but compiled code does not notice that hooks were added to a
    module, and does notice that a module is of another class.

    Args:
        model: as of :func:`run_with_queries`.
        images: likewise.
        watched: watchers by the name of an attention's module, each called once per layer, in the order they run.
        places: :func:`attention_places` of the model.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def put(parent: nn.Module, name: str, module: nn.Module) -> None:
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, module)

    try:
        for place in places:
            layer = place.module
            if type(layer) in ATTENTIONS:
                layer = ATTENTIONS[type(layer)](layer, None, place.name)
                put(*place, layer)
            for part, watcher in watched.items():
                put(layer, part, watcher(getattr(layer, part)))
        return model(images)
    finally:
        for parent, name, module in reversed(replaced):
            setattr(parent, name, module)


class _Recorded(nn.Module):
    """``source``, whose outputs or inputs are kept in a list too."""

    def __init__(self, source: nn.Module, values: list[Tensor], *, output: bool) -> None:
        super().__init__()
        self.source, self.values, self.output = source, values, output

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.source(x)
        self.values.append(output if self.output else x)
        return output
