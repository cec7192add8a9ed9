"""Edits of nested data: every entry dropped, renamed, resized, or something else in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

NONSENSE: list[Any] = [
    None, True, 0, -1, 2.5, 10**30, 10**400, math.nan, math.inf, "", "x", "two\nlines \x1b[31m", b"bytes", [], [1], {},
    (), {"x": 1}, {1, 2}, complex(1, 1), torch.zeros(7, 7, 7), torch.full((2, 3), math.nan),
    torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(2, device="meta"),
    torch.zeros(1).expand(10**12), torch.float32,
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry in nested data."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(content: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """Return a copy of nested data in which the entry at ``path`` is dropped, renamed, resized or something else."""
    content = copy.deepcopy(content)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    key = path[-1]
    if how == "drop":
        del inside[key]
    elif how == "rename" and isinstance(inside, dict):
        inside[value if isinstance(value, (str, int)) else f"{key}x"] = inside.pop(key)
    elif how == "resize" and isinstance(inside[key], torch.Tensor):
        inside[key] = torch.cat([inside[key].flatten()] * 2)
    elif how == "resize" and isinstance(inside[key], (str, list)):
        inside[key] = inside[key] * 2
    else:
        inside[key] = value
    return content
