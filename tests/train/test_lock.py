"""Two commands and one folder: the second one is refused, whatever the first one is, until it has ended somehow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

import jobs
from commands import run, sentence
from qvit.errors import ConfigError
from qvit.study.demo import run_demo
from qvit.train.lock import LOCK, alone_in, locked
from qvit.train.options import Options, make_accelerator

TRAIN = ["train", jobs.MODEL, "--full-precision", "--data", "digits", "--cpu"]


def _hold(folder: Path, *, fork: bool) -> None:
    with alone_in(folder, make_accelerator(Options(folder, cpu=True))):
        if fork and os.fork() == 0:  # as a data loader's worker, which lives on for a while when its parent is killed
            (folder / "child").write_text(str(os.getpid()))
            signal.pause()
        (folder / "held").touch()
        signal.pause()


def test_a_second_command_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    process = jobs.start(_hold, tmp_path, fork=False)
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.02)
    said = sentence(run(*TRAIN, "--out", tmp_path))
    assert said == f"qvit: Another command is writing to {tmp_path} at present: give another --out, or wait for it."
    with pytest.raises(ConfigError, match="Another command is writing to"):
        run_demo(tmp_path, Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "lock"]
    process.kill()
    process.join()


def test_a_killed_command_keeps_nobody_out(tmp_path: Path) -> None:
    process = jobs.start(_hold, tmp_path, fork=True)
    while not ((tmp_path / "held").exists() and (tmp_path / "child").exists()):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)  # it is still there
    with locked(tmp_path / LOCK, make_accelerator(Options(tmp_path, cpu=True))) as free:
        assert free
    os.kill(child, signal.SIGKILL)


def test_the_processes_of_one_command_share_its_lock(tmp_path: Path) -> None:
    jobs.together(_together, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-*")) == [
        "0-refused",
        "0-was-alone",
        "1-refused",
        "1-was-alone",
    ]


def _together(folder: Path) -> None:
    accelerator = make_accelerator(Options(folder, cpu=True))
    rank = accelerator.process_index
    with alone_in(folder, accelerator):
        (folder / f"{rank}-was-alone").touch()
        accelerator.wait_for_everyone()
        with locked(folder / LOCK, accelerator) as free:  # as another command would ask
            if not free:
                (folder / f"{rank}-refused").touch()


def test_a_run_that_came_between_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvit.cli import options as module

    check, asked = module.check_out, []

    def note(options: Options) -> None:
        check(options)
        asked.append(options)
        if len(asked) == 1:  # another command starts, saves and ends here
            tmp_path.mkdir(exist_ok=True)
            (tmp_path / "last.pt").touch()

    monkeypatch.setattr(module, "check_out", note)
    assert "holds a run already" in sentence(run(*TRAIN, "--out", tmp_path))
