"""What a figure or a report of a fault depends on: versions, processor, instruction sets. No PyTorch here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

from qvit._version import __version__
from qvit.runtime.engine import instruction_sets
from qvit.runtime.processors import processors


def environment() -> dict[str, Any]:
    """Return what a report of a fault needs, as plain data without paths and names of hosts.

    ``qvit`` (its version), what :func:`machine` tells, ``instruction_sets`` (of the engine here, best first) and
    ``packages`` (version by name, ``None`` where it is not installed).
    """
    return {
        "qvit": __version__,
        **machine(),
        "instruction_sets": instruction_sets(),
        "packages": {name: _version_of(name) for name in _packages()},
    }


def machine() -> dict[str, str]:
    """Return the CPU's name, its vector instructions, its cores and the system."""
    name, flags = platform.processor(), ""
    with contextlib.suppress(OSError):  # elsewhere than on Linux there is no such file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor"):
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                wanted = ("avx", "fma", "amx", "asimd", "sve", "i8mm")
                flags = " ".join(sorted(flag for flag in value.split() if flag.startswith(wanted)))
                break
    return {
        "cpu": name or platform.machine(),
        "instructions": flags,
        "processors": str(processors()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _packages() -> list[str]:
    """Return what qvit may be installed with, without what only its developers need.

    An extra asks for another as a ``qvit`` of its own, which is none of them.
    """
    required = importlib.metadata.requires("qvit") or []
    named = (re.match(r"[\w.-]+", line) for line in required if not line.endswith('extra == "dev"'))
    return list(dict.fromkeys(name[0] for name in named if name and name[0] != "qvit"))


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
