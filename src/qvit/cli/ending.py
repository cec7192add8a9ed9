"""How a command ends: in a result and status 0, or in one sentence on standard error and another status."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

from qvit.errors import CorruptImageError, QvitError, TrainingStopped
from qvit.files import first_line, printable

REFUSED = 2
"""A mistake of the user's, or something that the machine does not give."""
INTERRUPTED, STOPPED = 130, 143
"""128 and the number of the signal, SIGINT or SIGTERM: what a shell reports of a program that the signal ended.

So a scheduler sees the same status whether SIGTERM came while a run trained, which then saves itself, or before.
"""
TRAINING_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "sklearn",
    "scipy",
    "matplotlib",
    "tensorboard",
    "yaml",
    "jinja2",
    "huggingface_hub",
)
SERVING_PACKAGES = ("uvicorn", "starlette", "anyio", "starlette_exporter", "prometheus_client")
EXTRAS = {
    **dict.fromkeys(TRAINING_PACKAGES, "train"),
    **dict.fromkeys(SERVING_PACKAGES, "serve"),
    "onnx": "onnx",
}
"""What brings a package, by its name."""
_SIGNS = (
    "can't allocate memory",  # PyTorch's allocator
    "annot allocate memory",  # the system
    "std::bad_alloc",
    "failed to map segment",  # the loader of shared libraries
    "can't start new thread",
    "out of memory",  # CUDA
)
_LESS_MEMORY = {
    "batch": "a smaller --batch",
    "batch_size": "a smaller --batch-size",
    "accumulate": "--accumulate",
    "pictures": "fewer --pictures",
    "study_images": "fewer --study-images",
    "workers": "fewer --workers",
    "threads": "fewer --threads",
}
"""What takes less memory, by the parameter of a command that it is asked for with."""
_RESERVE = 4 << 20
"""Bytes that are let go where memory is short: to end takes some too. Untouched, they are addresses and no memory."""
_Command = TypeVar("_Command", bound=Callable[..., None])


class Terminated(BaseException):
    """SIGTERM came. As Ctrl-C it is no error, so that nothing takes it for one and goes on."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by :class:`Terminated`, so that temporary folders are removed; a second one at once."""

    def end_the_block(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to that one alone
        yield
        return
    before = signal.signal(signal.SIGTERM, end_the_block)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rank() -> int:
    """Return which process this is under torchrun or accelerate launch; the others stay silent."""
    return int(os.environ.get("RANK", "0"))


def leave_the_others() -> None:
    """Leave the processes that have come to this end together, if there are any."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from qvit.train.distributed import leave

        leave()


def less_memory(command: Callable[..., None]) -> str:
    """Return what may help where a command lacks memory: of its options those that ask for less."""
    ways = [way for name, way in _LESS_MEMORY.items() if name in inspect.signature(command).parameters]
    return "Free some or raise the limit" + (f", or ask for less at once ({', '.join(ways)})." if ways else ".")


def ends_in_a_sentence(command: _Command) -> _Command:
    """Return ``command`` such that what is expected to go wrong ends in a sentence and a status, not in a traceback."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        sentence: str | None = None
        reserve: bytes | None = None
        try:
            reserve = bytes(_RESERVE)
            try:
                command(*args, **kwargs)
            except TrainingStopped as stopped:
                sentence = str(stopped)
            leave_the_others()  # after the exception, whose frames hold what was trained
        except KeyboardInterrupt as interrupt:
            end(str(interrupt) or "Interrupted.", INTERRUPTED)
        except CorruptImageError as error:  # of this process's part of the images: the first one does not know of it
            end(str(error), REFUSED, everywhere=True)
        except QvitError as error:
            end(str(error), REFUSED)
        except ModuleNotFoundError as missing:
            extra = EXTRAS.get((missing.name or "").partition(".")[0])
            if extra is None:
                raise
            end(f"This command needs {missing.name}: pip install 'qvit[{extra}]' brings it.", REFUSED)
        except (MemoryError, ImportError, RuntimeError, OSError) as error:
            del reserve
            _end_if_a_worker_was_killed(error)
            shortage = memory_shortage(error)
            if shortage is not None:
                end(f"There is not enough memory: {shortage} {less_memory(command)}", REFUSED, everywhere=True)
            if not isinstance(error, OSError):
                raise
            end(f"{error.strerror or first_line(error)}: {error.filename or 'the output'}.", REFUSED, everywhere=True)
        if sentence is not None:
            end(sentence, STOPPED)

    return run  # type: ignore[return-value]


def _end_if_a_worker_was_killed(error: BaseException) -> None:
    if not isinstance(error, RuntimeError) or "qvit.data.loader" not in sys.modules:  # where there are workers
        return
    import multiprocessing

    from qvit.data.loader import end_workers, worker_killed

    killed = worker_killed(error)
    if killed is not None:
        end_workers(multiprocessing.active_children())
        end(str(killed), REFUSED, everywhere=True)


def memory_shortage(error: BaseException) -> str | None:
    """Return the sentence in which an error tells of a want of memory, or ``None`` if it is about something else.

    Such an error has another class in every library, in some a page of advice around that sentence, and in some it is
    only the cause of another.
    """
    for line in str(error).splitlines():
        if any(sign in line for sign in _SIGNS):
            return f"{line.strip()[:200].rstrip('.')}."
    known = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if known:
        return first_line(error)
    return memory_shortage(error.__cause__) if error.__cause__ else None


def end(sentence: str, status: int, *, everywhere: bool = False) -> NoReturn:
    """Print a sentence, in the first process or ``everywhere``, and end the program."""
    sys.stdout.flush()
    if everywhere or rank() == 0:
        print(f"qvit: {printable(sentence)}", file=sys.stderr)
    sys.exit(status)
