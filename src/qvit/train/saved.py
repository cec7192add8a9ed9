"""What a checkpoint holds for going on with a run, checked before anything of it is used: the file may be edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, strided

from qvit.errors import CheckpointError, ConfigError
from qvit.files import shown
from qvit.format.fields import is_whole
from qvit.models.spec import check_plain
from qvit.nn.state import is_finite, why_not_like

PARTS = ("trained", "optimizer", "oscillation", "random", "order", "progress")
EVALUATED = ("val_top1", "val_top5", "val_images", "unreadable")
"""What the record of every epoch has, among other numbers."""
CLIPPING = "max_grad_norm"
"""LAMB's own, which is off where the training is sharded: there the loop clips."""
MOST = 2**48
"""Of anything that is counted."""


def check_training(training: Any, path: object) -> None:
    """Refuse what is no training state as :meth:`qvit.train.run.Run.save` writes it, in all but tensors.

    Raises:
        CheckpointError: naming the file and the entry.
    """
    for name in PARTS:
        if name not in training:
            raise broken(path, f"training.{name} is absent")
    try:
        check_plain("training.order", training["order"])
        check_plain("training.progress", training["progress"])
    except ConfigError as error:
        raise broken(path, str(error).rstrip(".")) from error
    trained = training["trained"]
    if trained is not None and not (isinstance(trained, dict) and all(isinstance(name, str) for name in trained)):
        raise broken(path, f"training.trained must be tensors by name, not {shown(trained)}")
    if not isinstance(training["order"], dict):
        raise broken(path, f"training.order must be names and values, not {shown(training['order'])}")
    why = _why_no_progress(training["progress"])
    if why:
        raise broken(path, f"training.progress {why}")


def check_like(saved: Any, present: Any, place: str, path: object) -> None:
    """Refuse saved state that is not like this run's ``present``: of its names, shapes and dtypes, numbers for numbers.

    Raises:
        CheckpointError: naming the file and the entry.
    """
    if isinstance(present, Mapping):
        if not isinstance(saved, dict):
            raise broken(path, f"{place} must be names and values, not {shown(saved)}")
        for name in present:
            if name not in saved:
                raise broken(path, f"{place}.{name} is absent")
            check_like(saved[name], present[name], f"{place}.{name}", path)
        for name in saved:
            if name not in present:
                raise broken(path, f"{place} has {shown(name)}, which this run has not")
    elif isinstance(present, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(present):
            raise broken(path, f"{place} must be {len(present)} values, not {shown(saved)}")
        for index, pair in enumerate(zip(saved, present, strict=True)):
            check_like(*pair, f"{place}[{index}]", path)
    elif isinstance(present, Tensor):
        why = why_not_like(saved, present)
        if why:
            raise broken(path, f"{place} {why}")
    elif is_finite(present):
        if not is_finite(saved):
            raise broken(path, f"{place} must be a number, not {shown(saved)}")
    elif type(saved) is not type(present) or saved != present:
        raise broken(path, f"{place} must be {shown(present)}, not {shown(saved)}")


def optimizer_state(saved: Any, present: dict[str, Any], path: object) -> dict[str, Any]:
    """Return an optimizer's saved state, with the settings of this run's ``present`` and the saved ones' numbers.

    Some optimizers count in their settings, in a number or a tensor of one. What else is there follows from recipe and
    processes, as the clipping does.

    Raises:
        CheckpointError: naming the file and the entry.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("param_groups"), list):
        raise broken(path, "training.optimizer has no state and param_groups")
    check_like(saved.get("state"), present["state"], "training.optimizer.state", path)
    groups = []
    for number, settings in enumerate(present["param_groups"]):
        found = saved["param_groups"][number] if number < len(saved["param_groups"]) else None
        if not isinstance(found, dict):
            raise broken(
                path, f"training.optimizer.param_groups[{number}] must be names and values, not {shown(found)}"
            )
        numbers = {
            name: found.get(name)
            for name, value in settings.items()
            if name != CLIPPING and (isinstance(value, Tensor) or is_finite(value))
        }
        for name, value in numbers.items():
            if not _is_scalar(value):
                place = f"training.optimizer.param_groups[{number}].{name}"
                raise broken(path, f"{place} must be a number, not {shown(value)}")
        groups.append({**settings, **numbers})
    return {"state": saved["state"], "param_groups": groups}


def broken(path: object, why: str) -> CheckpointError:
    """Return the error of a training state that this run cannot go on from."""
    return CheckpointError(f"{path} was edited, is damaged or is of another run: {why}.")


def _why_no_progress(progress: Any) -> str | None:
    counts, fields = ("epoch", "step", "images", "unreadable"), ("sums", "seconds", "history")
    if not isinstance(progress, dict) or set(progress) != {*counts, *fields}:
        return f"must have {', '.join((*counts, *fields))}, it is {shown(progress)}"
    for name in counts:
        if not is_whole(progress[name], 0, MOST):
            return f"must have a whole number as {name}, not {shown(progress[name])}"
    if not _are_numbers([progress["seconds"]]) or not progress["seconds"] >= 0:
        return f"must have a time as seconds, not {shown(progress['seconds'])}"
    if progress["step"] and not (progress["images"] and progress["seconds"]):
        return "is in the middle of an epoch and has no images or no time"
    if not isinstance(progress["sums"], dict) or not _are_numbers(progress["sums"].values()):
        return f"must have numbers by name as sums, not {shown(progress['sums'])}"
    history = progress["history"]
    if not isinstance(history, list) or len(history) != progress["epoch"]:
        return f"has finished {progress['epoch']} epochs and must have a record of each, not {shown(history)}"
    for record in history:
        if not isinstance(record, dict) or not _are_numbers(record.values()) or not {*EVALUATED} <= record.keys():
            return f"has a record of an epoch that must be numbers by name, and is {shown(record)}"
    return None


def _are_numbers(values: Any) -> bool:
    return all(map(is_finite, values))


def _is_scalar(value: Any) -> bool:
    """Return whether it is a number, or a tensor of one; of an edited file it may be on a device without values."""
    if type(value) is not Tensor:
        return is_finite(value)
    return value.device.type == "cpu" and value.layout == strided and value.numel() == 1 and is_finite(value.item())
