"""Files and folders that one command at a time writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from qvit.errors import ConfigError, OutputError
from qvit.files import first_line, make_folder

LOCK = "lock"
"""Name of the lock file of a folder that one command at a time writes to."""


@contextmanager
def locked(file: Path, accelerator: Accelerator) -> Iterator[bool]:
    """Say whether this command, and no other, has the lock ``file`` until the block ends; all its processes must ask.

    The main process holds the lock. The system takes it away when that process ends, however it ends, so what a killed
    command leaves behind keeps nobody out; its loaders' processes, which may live on for seconds, do not inherit it.

    Raises:
        OutputError: if the file, or a folder for it, cannot be made.
    """
    make_folder(file.parent)
    lock = FileLock(file)
    answer = [True]
    if accelerator.is_main_process:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            answer = [False]
        except OSError as error:
            raise OutputError(f"Cannot write into {file.parent}: {first_line(error)}") from error
    try:
        yield broadcast_object_list(answer)[0] if accelerator.num_processes > 1 else answer[0]
    finally:
        lock.release()


@contextmanager
def alone_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Let no other command write to ``folder`` until the block ends.

    Raises:
        ConfigError: if another one does at present.
        OutputError: if nothing can be written there.
    """
    with locked(folder / LOCK, accelerator) as free:
        if not free:
            raise ConfigError(f"Another command is writing to {folder} at present: give another --out, or wait for it.")
        yield
