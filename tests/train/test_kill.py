"""Real processes, really killed, and what is left of them."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import jobs
from qvit.errors import CheckpointError, OutputError
from qvit.models.checkpoint import load_checkpoint, read_checkpoint
from qvit.train.loop import read_metrics
from qvit.train.run import Progress, Run, SaveEvery

# Everything that a run carries from step to step: averages, frozen weights, dropout, repeated augmentation.
CHANGES = [
    "quantized.epochs=2",
    "quantized.batch_size=128",
    "quantized.ema_decay=0.9",
    "quantized.freeze_oscillating=0.02",
    "quantized.repeated_augmentation=2",
    "quantized.clip_grad=1.0",
    "model_args.proj_drop_rate=0.1",
]


def identical(a: object, b: object) -> bool:
    """Say whether two checkpoints' contents are equal to the last bit, times aside."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        timeless = {name for name in a if "second" not in str(name)}
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[name], b[name]) for name in timeless)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))  # type: ignore[arg-type]
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    process = jobs.start(jobs.quantized, out, CHANGES, save_every=SaveEvery(steps=3))
    process.join()
    assert process.exitcode == 0
    return out


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """Each attempt goes on from the last save: it comes further than it would from the start."""
    draw, reached = random.Random(0), [Progress()]
    # The first attempts die at random steps, one of them half-way through a save; the last one may finish.
    deaths = [(draw.randint(5, 9), None), (None, 2), (draw.randint(4, 9), None)]
    for step, save in deaths:
        resume = (tmp_path / "last.pt").exists()
        process = jobs.start(
            jobs.killed, jobs.quantized, step, save, tmp_path, CHANGES, save_every=SaveEvery(steps=3), resume=resume
        )
        process.join()
        assert process.exitcode == -signal.SIGKILL
        _, _, training = read_checkpoint(tmp_path / "last.pt")
        assert training is not None
        reached.append(Progress(**training["progress"]))
        assert (reached[-2].epoch, reached[-2].step) < (reached[-1].epoch, reached[-1].step)
    said = tmp_path / "said"
    process = jobs.start(_resume_and_note, tmp_path, said)
    process.join()
    assert process.exitcode == 0
    assert said.read_text().startswith(f"Going on from last.pt: {reached[-1]}.\n")
    assert identical(read_checkpoint(whole / "last.pt")[1:], read_checkpoint(tmp_path / "last.pt")[1:])
    assert identical(read_checkpoint(whole / "best.pt")[1:], read_checkpoint(tmp_path / "best.pt")[1:])
    assert identical(read_metrics(whole), read_metrics(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_average_of_the_weights_is_what_is_saved_and_measured(whole: Path) -> None:
    _, weights, training = read_checkpoint(whole / "last.pt")
    assert training is not None
    assert not torch.equal(weights["head.weight"], training["trained"]["head.weight"])
    frozen = torch.cat([state["frozen"].flatten() for state in training["oscillation"].values()])
    assert 100 * frozen.double().mean().item() == pytest.approx(read_metrics(whole)[-1]["frozen"])


def test_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path: Path, whole: Path) -> None:
    content = (whole / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "previous.pt").write_bytes((whole / "previous.pt").read_bytes())
    said = tmp_path / "said"
    process = jobs.start(_resume_and_note, tmp_path, said)
    process.join()
    assert process.exitcode == 0
    first, second = said.read_text().splitlines()[:2]
    assert "last.pt was cut short or damaged. Falling back to previous.pt, the one before it." in first
    # Of 22 steps, 11 an epoch, every third is saved: the last one before the end is the 21st.
    assert second == "Going on from previous.pt: epoch 2, step 10."
    assert identical(read_checkpoint(whole / "last.pt")[1:], read_checkpoint(tmp_path / "last.pt")[1:])
    assert (tmp_path / "damaged.pt").stat().st_size == len(content) // 2


def _resume_and_note(out: Path, said: Path) -> None:
    from rich.console import Console

    with said.open("w") as file:
        jobs.Console = lambda **_: Console(file=file, width=200)  # type: ignore[assignment, misc]
        jobs.quantized(out, CHANGES, save_every=SaveEvery(steps=3), resume=True)


def test_resume_refuses_another_seed(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "last.pt").write_bytes((whole / "last.pt").read_bytes())
    with pytest.raises(CheckpointError, match="seed 0, this one with seed 1"):
        jobs.quantized(tmp_path, CHANGES, resume=True, seed=1)


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, save = 0, torch.save

    def fills_up(content: object, path: Path) -> None:
        nonlocal saves
        saves += 1
        save(content, path if saves < 3 else "/dev/full")

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(OutputError, match="Cannot write .*last.pt"):
        jobs.full_precision(tmp_path, ["full_precision.batch_size=256"], save_every=SaveEvery(steps=1))
    _, _, training = read_checkpoint(tmp_path / "last.pt")
    assert training is not None
    assert training["progress"]["step"] == 2
    load_checkpoint(tmp_path / "previous.pt")


def test_sigterm_saves_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    process = jobs.start(_train_for_long, tmp_path)
    while not (tmp_path / "last.pt").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert "Stopped by SIGTERM at epoch" in said
    _, _, training = read_checkpoint(tmp_path / "last.pt")
    assert training is not None
    progress = training["progress"]
    assert f"epoch {progress['epoch'] + 1}, step {progress['step']};" in said or "the end of epoch" in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_says_how_to_go_on_and_has_a_status_of_its_own(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = jobs.start(_command, tmp_path / "said", *TRAIN, "--out", str(tmp_path / "run"), "--save-every", "4")
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    (said,) = (tmp_path / "said").read_text().splitlines()
    _, _, training = read_checkpoint(tmp_path / "run" / "last.pt")
    assert training is not None
    where = str(Progress(**training["progress"]))
    if number == signal.SIGTERM:
        start, end = f"qvit: Stopped by SIGTERM at {where}; ", "last.pt is saved: "
    else:
        start, end = "qvit: Interrupted in epoch ", f"last.pt holds {where}: "
    assert said.startswith(start)
    assert said.endswith(f"{end}the same command goes on there (qvit train with --resume).")


def test_ctrl_c_before_anything_is_saved_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted in epoch 1, step 1; nothing was saved before\.$"):
        jobs.full_precision(tmp_path, [])


def test_sigterm_in_the_last_step_leaves_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Run.save

    def save_and_signal(self: Run, *, best: bool = False) -> None:
        save(self, best=best)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save", save_and_signal)
    changes = ["full_precision.epochs=1", "full_precision.batch_size=512"]
    assert len(jobs.full_precision(tmp_path, changes)) == 1


TRAIN = ["train", jobs.MODEL, "--full-precision", "--data", "digits", "--cpu", "--set", "full_precision.epochs=10000"]
TRAIN += [argument for change in jobs.TINY for argument in ("--set", change)]


def _command(said: Path, *arguments: str) -> None:
    from qvit.cli import app as cli

    sys.argv = ["qvit", *arguments]
    sys.stderr = said.open("w")
    try:
        cli.main()
    finally:
        sys.stderr.close()
        sys.stderr = sys.__stderr__


def _train_for_long(out: Path) -> None:
    from qvit.errors import TrainingStopped

    try:
        jobs.full_precision(out, ["full_precision.epochs=10000"], save_every=SaveEvery(steps=4))
    except TrainingStopped as stopped:
        (out / "said").write_text(str(stopped))
