"""A run whose last.pt was edited goes on or ends in one sentence, whatever was edited."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import jobs
from edits import NONSENSE, edited, places
from qvit.errors import CheckpointError, NewerCheckpointError, QvitError
from qvit.train import loop
from qvit.train.methods import train_quantized
from qvit.train.options import Options
from qvit.train.run import SaveEvery

CHANGES = ["quantized.epochs=1", "quantized.batch_size=400", "quantized.calibration_images=8", "model_args.depth=1"]
PARTS = jobs.parts([*CHANGES, "quantized.ema_decay=0.5", "quantized.freeze_oscillating=0.02"])


class StandsStillError(Exception):
    pass


def train(folder: Path, console: Console | None = None, **options: Any) -> None:
    recipe, data, start = PARTS
    made = Options(folder, cpu=True, save_every=SaveEvery(steps=1), **options)
    console = console or Console(file=io.StringIO())
    train_quantized(start, start, "q-vit", (3, 3), "head", data, recipe, made, console)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was cut off after its first step."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "is_due", lambda self, every: pytest.fail("cut off") if self.progress.step else True)
        with pytest.raises(pytest.fail.Exception):
            train(folder)
    (folder / "previous.pt").unlink(missing_ok=True)
    return folder


def resumed(folder: Path, content: dict[str, Any], console: Console | None = None) -> str:
    """Return what is said where a run goes on from ``content``, up to its next step; "fine" if nothing."""

    def stand_still(self: Any) -> None:
        raise StandsStillError

    torch.save(content, folder / "last.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "scale_gradients", stand_still)
        patch.setattr(loop.Oscillation, "update", stand_still)  # once all that was restored has been used
        try:
            train(folder, console, resume=True)
        except StandsStillError:
            return "fine"
        except QvitError as error:
            assert isinstance(error, CheckpointError), repr(error)  # noqa: PT017
            return str(error)
    return "finished"


@pytest.fixture(scope="module")
def content(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "last.pt", weights_only=True)
    assert loaded["training"]["trained"] is not None
    assert loaded["training"]["progress"]["step"] == 1
    return loaded


def test_run_that_was_not_edited_goes_on(run: Path, content: dict[str, Any]) -> None:
    assert resumed(run, content) == "fine"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_edited_run_goes_on_or_ends_in_a_sentence(run: Path, content: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(places(content["training"], ("training",)))))
    how = data.draw(st.sampled_from(["drop", "rename", "resize", "retype"]))
    said = resumed(run, edited(content, path, how, data.draw(st.sampled_from(NONSENSE))))
    assert said.isprintable(), repr(said)
    assert len(said.replace(str(run), "")) < 500
    if said not in ("fine", "finished"):
        assert said.startswith(str(run / "last.pt"))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("optimizer",), None, "training.optimizer has no state and param_groups"),
        (("optimizer", "state"), {}, r"training\.optimizer\.state\.\S+ is absent"),
        (("optimizer", "param_groups"), [], r"training.optimizer.param_groups\[0\] must be"),
        (("progress", "epoch"), 7, "has finished 7 epochs and must have a record of each"),
        (("progress", "step"), 10**9, "it has made 1000000000 steps of"),
        (("progress", "seconds"), 10**400, "must have a time as seconds"),
        (("progress", "seconds"), 0.0, "is in the middle of an epoch and has no images or no time"),
        (("progress", "history"), [{}], "has finished 0 epochs"),
        (("trained",), None, "averages the weights"),
        (("random",), [{}], "training.random is no state"),
        (("random",), 5, "training.random is no state"),
        (("oscillation",), None, "training.oscillation must be names and values"),
        (("order",), [], "training.order must be names and values"),
        (("order", "seed"), "x" * 10**5, r"is of a run with seed x{60}\.\.\., this one with seed 0"),
    ],
)
def test_what_was_edited_is_named(
    run: Path, content: dict[str, Any], path: tuple[str, ...], value: Any, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        raise CheckpointError(resumed(run, edited(content, ("training", *path), "retype", value)))


def test_position_beyond_numpys_state_is_refused(run: Path, content: dict[str, Any]) -> None:
    name, keys, _, *rest = content["training"]["random"][0]["numpy"]
    random = [{**content["training"]["random"][0], "numpy": (name, keys, 10**9, *rest)}]
    assert "training.random is no state" in resumed(run, edited(content, ("training", "random"), "retype", random))


@pytest.mark.parametrize("part", ["weights", "trained"])
def test_weights_with_a_nan_are_not_gone_on_with(run: Path, content: dict[str, Any], part: str) -> None:
    path = ("weights",) if part == "weights" else ("training", "trained")
    nan = torch.full_like(content["weights"]["norm.weight"], float("nan"))
    assert "norm.weight holds a NaN" in resumed(run, edited(content, (*path, "norm.weight"), "retype", nan))


def test_newer_run_is_not_taken_for_damaged(run: Path, content: dict[str, Any]) -> None:
    torch.save(content, run / "previous.pt")
    shown = io.StringIO()
    try:
        said = resumed(run, {**content, "version": 99}, Console(file=shown, width=300))
        assert "version 99" in said
        assert "update qvit" in said
        # An edited one is described, and the one before it is taken.
        assert resumed(run, {**content, "version": "x"}, Console(file=shown, width=300)) == "fine"
    finally:
        (run / "previous.pt").unlink()
    assert "its version must be a whole number from 1 up, not 'x'. Falling back to previous.pt" in shown.getvalue()
    assert issubclass(NewerCheckpointError, CheckpointError)
