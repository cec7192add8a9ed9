"""SIGTERM, by which a cluster announces that it takes a node away, and Ctrl-C: noted, and obeyed after the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from qvit.errors import TrainingStopped


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


class Interrupts(Sigterm):
    """Within ``with``, SIGTERM and Ctrl-C only set :attr:`error` to what they are to be obeyed by raising."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[KeyboardInterrupt] | type[TrainingStopped] | None = None

    def __enter__(self) -> Interrupts:
        super().__enter__()
        # Of a process in the background Ctrl-C is none of its own, and ignored.
        self._noted = self._in_main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)
        if self._noted:
            self._before_ctrl_c = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._noted:
            signal.signal(signal.SIGINT, self._before_ctrl_c)

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        self.error = KeyboardInterrupt if number == signal.SIGINT else TrainingStopped
