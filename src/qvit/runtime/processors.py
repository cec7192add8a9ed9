"""How many processors this process may use: the affinity mask, and what a container gets of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

MOST_THREADS = 1024
"""Of an engine; beyond, their memory is all that they would bring."""


def processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may use: a container or taskset may allow fewer than there are.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Half a processor still needs a thread, and a share of three and a half feeds no more than four.
    return min([count, *(math.ceil(quota) for quota in _quotas(root))])


def _quotas(root: Path) -> Iterator[float]:
    """Yield the processors that each control group above this process may take, where there is a limit."""
    for kind, path in _groups(root):
        folders = [Path(path), *Path(path).parents]
        for folder in folders:
            # Inside a container the group's own path may not exist: then the root of the mount is the container's.
            place = root / "sys/fs/cgroup" / kind / str(folder).lstrip("/")
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if kind:
                    quota = int((place / "cpu.cfs_quota_us").read_text())
                    period = int((place / "cpu.cfs_period_us").read_text())
                else:
                    limit, _, span = (place / "cpu.max").read_text().partition(" ")
                    quota, period = -1 if limit == "max" else int(limit), int(span)
                if quota > 0:
                    yield quota / period


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the controller's folder (``""`` for version 2) and the path of each group of this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            yield "", path
        elif "cpu" in controllers.split(","):
            yield "cpu", path
