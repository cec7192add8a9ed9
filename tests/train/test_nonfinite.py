"""A NaN stops the training before it is in the weights, and is traced to where it came from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import jobs
import qvit.train.methods
from qvit import quantize
from qvit.errors import NonFiniteLossError
from qvit.models.checkpoint import load_checkpoint, read_checkpoint
from qvit.train.methods import train_full_precision, train_quantized
from qvit.train.options import Options
from qvit.train.run import SaveEvery


class Spoil:
    """A forward hook that multiplies a module's output by ``factor`` from the ``step``-th training step on."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor, self.steps = step, factor, 0

    def __call__(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.steps += module.training
        return output * self.factor if self.steps >= self.step else output


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_layer_where_it_first_appears_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    recipe, data, start = jobs.parts(["quantized.epochs=1"])

    def spoiled(*args: Any) -> Any:
        student = quantize(*args)
        # Its quantizers clip an infinity: only the gradients show it.
        student.blocks[1].mlp.act.register_forward_hook(Spoil(4, factor))
        return student

    monkeypatch.setattr(qvit.train.methods, "quantize", spoiled)
    options = Options(tmp_path, cpu=True, save_every=SaveEvery(steps=1))
    message = r"epoch 1, step 4, first in blocks\.1\.mlp\.act; .*last.pt holds epoch 1, step 3\. Start anew"
    with pytest.raises(NonFiniteLossError, match=message):
        train_quantized(start, None, "baseline", (4, 4), "head", data, recipe, options, Console(quiet=True))
    model, _ = load_checkpoint(tmp_path / "last.pt")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_gradient_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data, start = jobs.parts(["full_precision.epochs=1"])

    def poisoned(spec: object) -> torch.nn.Module:
        start.model.blocks[0].norm2.weight.register_hook(lambda gradient: gradient * float("nan"))
        return start.model

    monkeypatch.setattr(qvit.train.methods, "create_model", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 1, first in the gradient of blocks\.0\.norm2\.weight; nothing"):
        train_full_precision(start.spec, data, recipe, Options(tmp_path, cpu=True), Console(quiet=True))


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    recipe, data, start = jobs.parts(["full_precision.lr=1e37", "full_precision.warmup_epochs=0"])
    options = Options(tmp_path, cpu=True, save_every=SaveEvery(steps=1))
    with pytest.raises(NonFiniteLossError, match=r"lower learning rate \(--set full_precision\.lr"):
        train_full_precision(start.spec, data, recipe, options, Console(quiet=True))
    for path in tmp_path.glob("*.pt"):
        weights = read_checkpoint(path)[1]
        assert all(torch.isfinite(value).all() for value in weights.values())
