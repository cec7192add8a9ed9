"""Two processes joined by gloo on the CPU train like one with the whole batch, and evaluate every image once."""

import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import jobs
from members import FAMILIES, family_member, student_of
from qvit import DistillationLoss, QuantConfig
from qvit.data.loader import make_loader, make_transform
from qvit.data.order import ALONE, EvaluationOrder, Rank, TrainOrder
from qvit.data.sources import open_data
from qvit.errors import ConfigError, TrainingStopped
from qvit.models.checkpoint import load_checkpoint
from qvit.models.families import family_of
from qvit.train.distributed import gradient_norm, scale_gradients, spread, sum_over_processes, whole_weights
from qvit.train.evaluate import evaluate
from qvit.train.loop import read_metrics
from qvit.train.optim import make_optimizer
from qvit.train.options import Options, make_accelerator, rank_of
from qvit.train.oscillation import Oscillation
from qvit.train.recipe import Hyperparameters
from qvit.train.run import Run, SaveEvery

Step = dict[str, Any]
"""Loss, norm of the gradients and weights after a step of training."""

FLOAT = ["full_precision.epochs=2", "full_precision.batch_size=240"]
# At 8 bits hardly a code flips where sums are rounded in another order, and the curves can be compared.
QUANTIZED = ["quantized.epochs=2", "quantized.batch_size=240", "quantized.ema_decay=0.9"]


def test_processes_divide_each_batch_without_overlap() -> None:
    alone = TrainOrder(103, 12, seed=3)
    orders = [TrainOrder(103, 12, seed=3, accumulate=2, rank=Rank(i, 3)) for i in range(3)]
    for order in (alone, *orders):
        order.begin(epoch=5, step=2)
    batches = list(alone)
    parts = [list(order) for order in orders]
    assert len(batches) == 103 // 12 - 2
    for step, batch in enumerate(batches):
        divided = [sample for part in parts for sample in part[2 * step] + part[2 * step + 1]]
        assert Counter(divided) == Counter(batch)
    assert max(Counter(sample.image for batch in batches for sample in batch).values()) == 1


def test_epochs_differ_and_the_order_can_be_entered_anywhere() -> None:
    order = TrainOrder(40, 8, seed=0)
    first = list(order)
    order.begin(0, 3)
    assert list(order) == first[3:]
    order.begin(1)
    assert list(order) != first


def test_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 6"):
        TrainOrder(100, 16, seed=0, accumulate=2, rank=Rank(0, 3))


@pytest.mark.parametrize("images", [1, 7, 8, 9])
def test_evaluation_takes_each_image_once(images: int) -> None:
    orders = [EvaluationOrder(images, 2, Rank(i, 4)) for i in range(4)]
    seen = [sample.image for order in orders for batch in order for sample in batch]
    assert sorted(seen) == list(range(images))
    assert all(len(list(order)) == len(order) for order in orders)
    assert [s.image for batch in EvaluationOrder(images, 2, ALONE) for s in batch] == list(range(images))


def test_float_training_follows_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    jobs.together(jobs.full_precision, tmp_path / "two", FLOAT)
    process = jobs.start(jobs.full_precision, tmp_path / "one", FLOAT)
    process.join()
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        # The same sums in another order: a part in a million a step, a part in ten thousand after two epochs.
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["val_images"] == a["val_images"] == 359
        assert b["val_top1"] == pytest.approx(a["val_top1"], abs=100 / 359)


def test_quantized_training_follows_one_process_and_evaluates_to_the_last_image(tmp_path: Path) -> None:
    jobs.together(jobs.quantized, tmp_path / "two", QUANTIZED, bits=8, accumulate=2)
    # Rectification takes its statistics from a part of the batch, so the parts must be the same ones.
    process = jobs.start(jobs.quantized, tmp_path / "one", QUANTIZED, bits=8, accumulate=2)
    process.join()
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("train_loss", "guided"):
            assert b[name] == pytest.approx(a[name], rel=5e-3)
    model, spec = load_checkpoint(tmp_path / "two" / "last.pt")
    val = make_loader(open_data("digits", mode="L").val, make_transform(spec.preprocessing), 50, shuffle=False)
    alone = evaluate(model, val, torch.device("cpu"))
    assert alone.images == 359
    assert (alone.top1, alone.top5) == (spec.metrics["val_top1"], spec.metrics["val_top5"])
    jobs.together(_evaluate, tmp_path / "two" / "last.pt", tmp_path / "said")
    assert json.loads((tmp_path / "said").read_text()) == [alone.top1, alone.top5, alone.images]


def _evaluate(checkpoint: Path, said: Path) -> None:
    accelerator = make_accelerator(Options(Path(), cpu=True))
    model, spec = load_checkpoint(checkpoint)
    val = open_data("digits", mode="L").val
    loader = make_loader(val, make_transform(spec.preprocessing), 50, shuffle=False, rank=rank_of(accelerator))
    accuracy = evaluate(model, loader, accelerator.device)
    if accelerator.is_main_process:
        said.write_text(json.dumps([accuracy.top1, accuracy.top5, accuracy.images]))


def test_sharded_training_follows_ddp_and_goes_on_in_one_process(tmp_path: Path) -> None:
    changes = [*QUANTIZED, "quantized.freeze_oscillating=0.5", "quantized.epochs=3"]
    every = SaveEvery(steps=4)
    jobs.together(_sharded, tmp_path / "fsdp", changes, bits=8, fsdp=True, save_every=every)
    first = read_metrics(tmp_path / "fsdp")
    assert len(first) == 2
    jobs.together(jobs.quantized, tmp_path / "ddp", changes, bits=8, save_every=every)
    process = jobs.start(jobs.quantized, tmp_path / "fsdp", changes, bits=8, resume=True)
    process.join()
    assert read_metrics(tmp_path / "fsdp")[:2] == first  # their seconds too: they were not trained again
    for a, b in zip(read_metrics(tmp_path / "ddp"), read_metrics(tmp_path / "fsdp"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=5e-3)
        assert b["val_images"] == 359


def _sharded(out: Path, changes: list[str], **options: Any) -> None:
    """Train two epochs until SIGTERM comes, and check at every step that the weights are in fact sharded."""
    update, save, sharded = Oscillation.update, Run.save, []

    def look(self: Oscillation) -> None:
        sharded.append(all(isinstance(layer.weight, DTensor) for layer in self.layers.values()))
        update(self)

    def save_and_stop(self: Run, *, best: bool = False) -> None:
        save(self, best=best)
        if self.progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    Oscillation.update = look  # type: ignore[method-assign]
    Run.save = save_and_stop  # type: ignore[method-assign]
    with contextlib.suppress(TrainingStopped):
        jobs.quantized(out, changes, **options)
    assert sharded
    assert all(sharded)


def test_every_familys_blocks_are_sharded_and_follow_ddp(tmp_path: Path) -> None:
    """What lies beside the blocks differs from family to family: merging layers, shared biases, rotations, pools."""
    members = [next(iter(family)) for family in FAMILIES.values()]
    jobs.together(_sharded_and_copied, members, tmp_path / "steps.pt")
    steps: dict[str, dict[str, Step]] = torch.load(tmp_path / "steps.pt")
    assert steps.keys() == set(members)
    for member, step in steps.items():
        for name in ("loss", "norm"):
            assert step["fsdp"][name] == pytest.approx(step["ddp"][name], rel=1e-4), (member, name)
        for name, tensor in step["ddp"]["weights"].items():
            torch.testing.assert_close(
                step["fsdp"]["weights"][name], tensor, rtol=1e-4, atol=1e-6, msg=f"{member} {name}"
            )


def _sharded_and_copied(members: list[str], out: Path) -> None:
    """Take a step with a student of each member, both ways, and write what came of it."""
    accelerator = make_accelerator(Options(Path(), cpu=True))
    steps = {
        member: {name: _step(member, accelerator, fsdp=name == "fsdp") for name in ("ddp", "fsdp")}
        for member in members
    }
    if accelerator.is_main_process:
        torch.save(steps, out)


def _step(member: str, accelerator: Accelerator, *, fsdp: bool) -> Step:
    """Return loss, norm of the gradients and new weights of one step of a student with 8 bits."""
    teacher, images = family_member(member)
    student = student_of(teacher, images, QuantConfig(8, 8, "head")).train()
    loss_fn, blocks = DistillationLoss(teacher), family_of(student).blocks(student)
    trained = spread(student, accelerator, fsdp=fsdp)
    assert all(isinstance(block, FSDPModule) == fsdp for block in blocks)
    optimizer, clip = make_optimizer(student, Hyperparameters(1, 8, 1e-2))
    own_images = slice(accelerator.process_index, None, accelerator.num_processes)
    loss = loss_fn(trained, images[own_images], torch.arange(len(images))[own_images])
    loss.backward()
    norm = gradient_norm(student)
    if 0 < clip < norm:
        scale_gradients(student, clip / norm)
    optimizer.step()
    total, count = sum_over_processes([float(loss.detach()), 1.0], accelerator.device)
    weights = whole_weights(student) if fsdp else student.state_dict()
    return {"loss": total / count, "norm": norm, "weights": weights}


def test_accumulated_parts_make_the_whole_batch(tmp_path: Path) -> None:
    for name, parts in (("whole", 1), ("parts", 4)):
        jobs.full_precision(tmp_path / name, ["full_precision.epochs=1", FLOAT[1]], accumulate=parts)
    whole, parts = (read_metrics(tmp_path / name)[0] for name in ("whole", "parts"))
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)


def test_sharded_model_in_one_process_is_just_a_model(tmp_path: Path) -> None:
    records = jobs.full_precision(tmp_path, ["full_precision.epochs=1", FLOAT[1]], fsdp=True)
    assert records[0]["val_images"] == 359
