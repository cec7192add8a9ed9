"""What makes a training the one it is, beside the model: a run that goes on must have the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from qvit.data.order import TrainOrder
from qvit.files import printable
from qvit.models.checkpoint import weights_checksum
from qvit.models.spec import ModelSpec
from qvit.train.recipe import RECONSTRUCTION, Hyperparameters

if TYPE_CHECKING:
    from qvit.train.options import Options  # which knows how often a run saves itself

_SHOWN, _LONGEST = 3, 60


def settings_of(
    hyperparameters: Hyperparameters,
    spec: ModelSpec,
    options: Options,
    order: TrainOrder,
    teacher: nn.Module | None,
    *,
    resident: bool,
) -> dict[str, Any]:
    """Return all that the result of a training depends on, as plain data, under the names that ``--set`` takes.

    What changes no more than rounding is not among it: the number of processes, how they share the model, compilation.

    Args:
        hyperparameters: of the recipe.
        spec: of the model, with method, recipe and preprocessing.
        options: of the run.
        order: of the training images.
        teacher: what the model is distilled from.
        resident: whether images are decoded once and augmented on the device.
    """
    quantized = spec.quant_config is not None
    unused = () if hyperparameters.reconstruct_first else RECONSTRUCTION
    entries = {name: value for name, value in dataclasses.asdict(hyperparameters).items() if name not in unused}
    settings: dict[str, Any] = {
        "quantized" if quantized else "full_precision": entries,
        "augmentation": spec.recipe["augmentation"],
        "preprocessing": spec.preprocessing,
        "method": spec.method,
        "teacher": None if teacher is None else f"{weights_checksum(teacher)[:16]}...",
        "seed": options.seed,
        "images": order.images,
        "precision": options.precision,
        "decode_once": resident,
    }
    if spec.quant_config is not None and spec.quant_config["rectifier"] == "head":
        settings["accumulate"] = options.accumulate  # in training, this reading takes its statistics part by part
    return dict(json.loads(json.dumps(settings)))


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Return what differs between two runs' settings, in words; nothing if nothing does.

    Only what both of them tell is compared.
    """
    found = list(_differing(saved, present, saved.keys() & present.keys()))
    if not found:
        return ""
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    first, second = (
        ", ".join(f"{_short(name)} {_short(pair[side])}" for name, *pair in found[:_SHOWN]) for side in (0, 1)
    )
    return f"{first}, this one with {second}{more}"


def _short(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _differing(
    saved: Mapping[str, Any], present: Mapping[str, Any], names: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(names):
        first, second = saved.get(name, "not set"), present.get(name, "not set")
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _differing(first, second, first.keys() | second.keys(), f"{prefix}{name}.")
        elif first != second:
            yield f"{prefix}{name}", first, second
