"""What to send with a report of a fault."""

from __future__ import annotations

from typing import Annotated

import typer

from qvit.files import printable


def report_env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print what a report of a fault needs: versions, processor, instruction sets, threads. Needs no PyTorch.

    No paths and no names of hosts or users are in it.

    Example:
      qvit report-env --json
    """
    import json

    from qvit.runtime.environment import environment

    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    found["instruction_sets"] = ", ".join(found["instruction_sets"])
    for name, version in found.pop("packages").items():
        found[name] = version or "not installed"
    for name, value in found.items():
        print(printable(f"{name}: {value}"))
