"""Queries, keys and attention maps of a model while it runs (docs/method.md, sections 3 and 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from qvit.models.families import ATTENTIONS
from qvit.nn.attention import QuantAttention
from qvit.nn.pool import QuantAttentionPool


def attention_layers(model: nn.Module) -> list[Any]:
    """Return the self-attention modules of a float or quantized model, in the order they run; not the poolings."""
    return [module for module in model.modules() if _is_layer(module)]


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
    return _run(model, images, {"query_rectifier": queries, "key_rectifier": keys}), queries, keys


def run_with_maps(model: nn.Module, images: Tensor) -> tuple[Any, list[Tensor]]:
    """Return ``model(images)``, and the map of every attention layer before its quantizer, ``(B, H, N, N)`` each.

    Arguments and B as for :func:`run_with_queries`.
    """
    maps: list[Tensor] = []
    return _run(model, images, {"attention_quantizer": maps}), maps


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
    watched = {"query_rectifier": queries, "key_rectifier": keys, "attention_quantizer": maps}
    return Attended(_run(model, images, watched), queries, keys, maps)


def _run(model: nn.Module, images: Tensor, watched: dict[str, list[Tensor]]) -> Any:
    """Run a model and keep what its attention layers' modules called ``watched`` see.

    While the model runs, other modules stand in the place of those, and in the place of a float attention one that
    computes the same through such modules; nothing of it is left afterwards. Hooks would do the same in eager mode, but
    compiled code does not notice that hooks were added to a module, and does notice that a module is of another class.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def put(parent: nn.Module, name: str, module: nn.Module) -> None:
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, module)

    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if not _is_layer(child):
                    continue
                if type(child) in ATTENTIONS:
                    child = ATTENTIONS[type(child)](child, None, name)
                    put(parent, name, child)
                for part, values in watched.items():
                    put(child, part, _Recorded(getattr(child, part), values, output=part != "attention_quantizer"))
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
