"""SIGTERM, by which a cluster announces that it takes a node away: noted, and obeyed at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Sigterm:
    """Within ``with``, SIGTERM only sets :attr:`received`."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Sigterm:
        # Python delivers signals to the main thread alone; a fit in another one leaves them as they are.
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
