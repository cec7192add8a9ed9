"""Writing files so that a reader sees the old one or the new one, never half of one; texts from files, to be shown.

Where a user says what a file or a folder is to be called, nothing may be there (:func:`check_absent`). A command sees
to that before its work begins (:func:`check_new`) and again where it writes (:func:`all_or_none`).

No PyTorch here.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeGuard

from qvit.errors import ConfigError, OutputError

BytesLike = bytes | bytearray | memoryview | mmap.mmap
"""What people hold the content of a file in; :func:`has_buffer` knows the others too."""


def write_atomically(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Call ``write(temporary path)`` beside ``path``, flush to disk and rename into place.

    Args:
        path: file to write.
        write: writes a file of the name it is given.
        previous: where to keep what was at ``path`` before; ``None`` to replace it.

    Raises:
        OutputError: if that fails; what was at ``path`` is still there.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise OutputError(f"Cannot write {path}: {first_line(error)} What was there before is untouched.") from error
    finally:
        _discard(temporary)


def make_folder(folder: Path) -> None:
    """Make a folder that is not there yet, and the folders above it.

    Raises:
        OutputError: if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        obstacle = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise OutputError(f"Cannot write into {folder}: {obstacle} is no folder: give another name.") from error
    except OSError as error:
        raise OutputError(f"Cannot write into {folder}: {first_line(error)}") from error


def check_absent(path: str | Path, otherwise: str = "move it away") -> None:
    """See that nothing is where a user wants a file or a folder to be written.

    Args:
        path: of the file or the folder.
        otherwise: what a user can do but give another name.

    Raises:
        ConfigError: if something is there, if only a link that leads nowhere.
    """
    if os.path.lexists(Path(path)):
        raise ConfigError(f"{path} is there already: give another name, or {otherwise}.")


def check_new(paths: Iterable[Path], otherwise: str = "move it away") -> None:
    """See that nothing is at these paths, and that files can be written there; folders above them are made.

    Args:
        paths: of files and folders.
        otherwise: as :func:`check_absent` takes it.

    Raises:
        ConfigError: if something is there, or two of them are one file.
        OutputError: if one cannot be written.
    """
    names: set[str] = set()
    with ExitStack() as made:
        for path in paths:
            name = os.path.realpath(path)
            if name in names:
                raise ConfigError(f"{path} would be written twice: give two names.")
            names.add(name)
            check_absent(path, otherwise)
            write_atomically(path, lambda temporary: temporary.write_bytes(b""))
            made.callback(path.unlink)


@contextmanager
def all_or_none(paths: Sequence[Path]) -> Iterator[None]:
    """Let the block write these files and folders, and remove them if it fails, so that a command can be repeated.

    Raises:
        ConfigError: if something is at one of the paths, before the block begins.
    """
    for path in paths:
        check_absent(path)
    try:
        yield
    except BaseException:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def has_buffer(source: object) -> TypeGuard[BytesLike]:
    """Return whether ``bytes(source)`` are the bytes of a buffer; they may be closed to reading by now."""
    try:
        memoryview(source).release()  # type: ignore[arg-type]
    except TypeError:
        return False
    except (BufferError, ValueError):
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as :func:`write_atomically` does."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def printable(text: object) -> str:
    """Return ``text`` in one line that no terminal takes for a command.

    Whatever is not a letter, a mark, a figure, a sign or a space is shown by its escape sequence, as ``repr`` shows it:
    line breaks, control characters, those that turn the direction of writing, halves of surrogate pairs (of which
    Python makes file names that are not UTF-8). For texts that come from files, names of files among them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(value: object) -> str:
    """Return a value from a file for an error message, in one line of a readable length."""
    if not isinstance(value, (str, bytes, int, float, list, tuple, dict, set, type(None))):
        return f"a {type(value).__name__}"
    try:
        text = printable(repr(value))
    except ValueError:  # Python refuses to print whole numbers of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, closed by a full stop."""
    lines = str(error).strip().splitlines()
    text = (lines[0] if lines else type(error).__name__)[:200].rstrip()
    return text if text.endswith(".") else f"{text}."


def cut(text: str, length: int = 300) -> str:
    """Return ``text`` for an error message, what is beyond ``length`` characters left out of its middle."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, without which a crash of the machine could undo a rename."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and its file systems need no such flush
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # the folder itself is not writable or not a folder: there is nothing to discard
        return
