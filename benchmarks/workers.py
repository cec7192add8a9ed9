"""Processes of benchmarks that wait until they are told to work."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence


class Worker:
    """A process that answers lines by lines; it has told that it is ready when this is made.

    Args:
        command: program and arguments.
        environment: its variables; this process's by default.

    Attributes:
        ready: its first line.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self.answer()

    def tell(self, line: str = "") -> None:
        """Send it a line."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def answer(self) -> str:
        """Return its next line.

        Raises:
            SystemExit: if it has ended; its own message stands above.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"A process failed, with status {self._process.wait()}.")
        return line

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
