"""Kill a training by SIGKILL at random moments, resume it each time, and compare its end with an uninterrupted one's.

The command line itself is run, started anew after every kill, on the digits. The moments are drawn between the first
save and a limit a run, so that some fall into a step, some into a save, some into an evaluation.

Example: python benchmarks/kill_resume.py --kills 10
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qvit.errors import CheckpointError
from qvit.models.checkpoint import read_checkpoint
from qvit.train.run import Progress, can_go_on

TRAIN = [sys.executable, "-m", "qvit.cli", "train", "vit_tiny_patch16_224", "--data", "digits", "--cpu"]
SAVE_EVERY = "5"


def main() -> None:
    """Train the teacher, the uninterrupted student and the killed one, and print where each kill fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, console = random.Random(arguments.seed), Console()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        teacher = ["--set", "full_precision.epochs=3", "--full-precision"]
        subprocess.run([*TRAIN, *teacher, "--out", str(out / "teacher")], check=True, stdout=subprocess.DEVNULL)
        student = [*TRAIN, "--bits", "2", "--teacher", str(out / "teacher" / "best.pt"), "--save-every", SAVE_EVERY]
        student += ["--set", f"quantized.epochs={arguments.epochs}", "--set", "quantized.ema_decay=0.99"]
        start = time.monotonic()
        subprocess.run([*student, "--out", str(out / "whole")], check=True, stdout=subprocess.DEVNULL)
        limit = (time.monotonic() - start) / (2 * arguments.kills)
        table = Table(title="Kills")
        for column in ("kill", "after", "last.pt then"):
            table.add_column(column, justify="right")
        kills = 0
        while kills < arguments.kills:
            seconds = draw.uniform(0, limit)
            if not run_and_kill([*student, "--out", str(out / "killed")], out / "killed", seconds):
                break  # it has come to its end
            kills += 1
            table.add_row(str(kills), f"{seconds:.2f} s", where(out / "killed" / "last.pt"))
        console.print(table)
        resume = ["--resume"] if can_go_on(out / "killed") else []
        subprocess.run([*student, "--out", str(out / "killed"), *resume], check=True, stdout=subprocess.DEVNULL)
        whole, killed = (read_checkpoint(out / name / "last.pt")[1] for name in ("whole", "killed"))
        different = [name for name in whole if not torch.equal(whole[name], killed[name])]
        console.print(f"{kills} kills; tensors that differ: {len(different)} of {len(whole)}", highlight=False)
        sys.exit(1 if different or kills < arguments.kills else 0)


def run_and_kill(command: list[str], out: Path, seconds: float) -> bool:
    """Start or resume a run and kill it so many seconds after its next save; say whether it was still running."""
    before = saved_at(out)
    process = subprocess.Popen([*command, *(["--resume"] if can_go_on(out) else [])], stdout=subprocess.DEVNULL)
    while process.poll() is None and saved_at(out) == before:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    status = process.wait()
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"The training failed with status {status}.")
    return status != 0


def saved_at(out: Path) -> int:
    """Return the time of the last save in nanoseconds, 0 before the first."""
    try:
        return (out / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:  # not yet, or between two renames
        return 0


def where(path: Path) -> str:
    """Return how far the run of a checkpoint has come."""
    try:
        _, _, training = read_checkpoint(path)
    except CheckpointError:
        return "none that can be read"
    return str(Progress(**training["progress"])) if training else "not of a run"


if __name__ == "__main__":
    main()
