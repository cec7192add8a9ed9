"""The command line, run in this process in front of a terminal of any encoding."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qvit.cli import app as cli
from qvit.cli.options import console


class Done(NamedTuple):
    """A finished command: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]
# What says of the surroundings how to write, wherever the tests run.
_TERMINAL = ("TERM", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


def run(*arguments: str | Path, encoding: str = "utf-8", main: Callable[[], None] = cli.main) -> Done:
    """Run ``qvit``, or another program's ``main``, with these arguments."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, newline="\n") for _ in range(2)]
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in _TERMINAL:
            patch.delenv(name, raising=False)
        console.cache_clear()  # it keeps the width that it was made with
        patch.setattr(sys, "argv", ["qvit", *map(str, arguments)])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return Done(status, out, err)


def sentence(done: Done, status: int = 2) -> str:
    """Return the one line in which a command ends that cannot do what it was asked."""
    assert done.status == status, done
    lines = done.err.strip().split("\n")
    assert len(lines) == 1, done.err
    assert lines[0].startswith("qvit: ")
    assert lines[0].endswith((".", "?"))
    return lines[0]
