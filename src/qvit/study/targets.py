"""The files that ``qvit quantize`` writes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from qvit.errors import ConfigError
from qvit.files import check_new, shown
from qvit.train.lock import locked


@dataclasses.dataclass(frozen=True)
class Targets:
    """The files that are written.

    Args:
        packed: the packed file.
        checkpoint: beside it, to train on from.
        partial: beside it, an unfinished reconstruction.
        report: the folder of the report, if there is to be one.
    """

    packed: Path
    checkpoint: Path
    partial: Path
    report: Path | None

    @classmethod
    def of(cls, out: Path, report: Path | None) -> Targets:
        """Return what is written for a packed file ``out``.

        Raises:
            ConfigError: if it has no name, or that of a checkpoint.
        """
        if not out.name:
            raise ConfigError(f"--out {shown(str(out))} is no name of a file: give one such as model.safetensors.")
        if out.suffix == ".pt":
            raise ConfigError(
                f"--out {out} is the packed file and the checkpoint lies beside it: call it {out.stem}.safetensors."
            )
        return cls(out, out.with_suffix(".pt"), out.with_suffix(".partial.pt"), report)

    @property
    def page(self) -> Path:
        """The report."""
        return (self.report or self.packed) / "report.html"

    @property
    def record(self) -> Path:
        """The report's figures."""
        return (self.report or self.packed) / "report.json"

    def begin(self, *, resume: bool) -> None:
        """See that there is something to go on with, or nothing, and that all can be written.

        Raises:
            ConfigError: otherwise, naming the file; as :meth:`check`.
            OutputError: as :meth:`check`.
        """
        if resume and not self.partial.exists():
            raise ConfigError(f"There is no {self.partial} to go on from: leave out --resume to start.")
        if self.partial.exists() and not resume:
            raise ConfigError(
                f"{self.partial} holds an unfinished reconstruction: give --resume to go on with it, or move it away."
            )
        self.check()

    def check(self) -> None:
        """See that no file is there that would be replaced, and that files can be written in its place.

        Raises:
            ConfigError: as :func:`qvit.files.check_new`.
            OutputError: likewise.
        """
        check_new([self.packed, self.checkpoint, *([self.page, self.record] if self.report is not None else [])])

    @contextmanager
    def alone(self, accelerator: Accelerator) -> Iterator[None]:
        """Let no other command write these files until the block ends.

        Raises:
            ConfigError: if another one does at present.
            OutputError: if nothing can be written there.
        """
        file = self.partial.with_name(f".{self.partial.name}.lock")
        with contextlib.ExitStack() as stack:
            free = stack.enter_context(locked(file, accelerator))
            if not free:
                raise ConfigError(f"Another command is writing {self.packed} at present: give another --out.")
            stack.callback(file.unlink, missing_ok=True)
            yield
