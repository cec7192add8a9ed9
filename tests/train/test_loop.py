import copy
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import top_k_accuracy_score

import jobs
from commands import run as run_command
from conftest import TEACHER
from qvit import QuantConfig, quantize
from qvit.analysis.statistics import query_key_statistics
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import ImageSets
from qvit.errors import CheckpointError, ConfigError, NonFiniteLossError
from qvit.models.checkpoint import load_checkpoint, read_checkpoint
from qvit.models.spec import create_model, describe
from qvit.train import loop, methods
from qvit.train.evaluate import evaluate
from qvit.train.loop import LabelLoss, read_metrics
from qvit.train.methods import FloatModel, train_full_precision, train_quantized
from qvit.train.optim import parameter_groups
from qvit.train.options import Options
from qvit.train.recipe import Recipe, load_recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "last.pt")[1]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def run(teacher: FloatModel, digits: ImageSets, recipe: Recipe, options: Options, method: str = "q-vit") -> None:
    train_quantized(teacher, teacher, method, (2, 2), "head", digits, recipe, options, Console(quiet=True))


def test_evaluation_counts_like_scikit_learn(teacher: FloatModel, digits: ImageSets) -> None:
    transform = make_transform(teacher.spec.preprocessing)
    loader = make_loader(digits.val, transform, 50, shuffle=False)
    accuracy = evaluate(teacher.model, loader, torch.device("cpu"))
    labels = np.array(digits.val.labels)  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = teacher.model(torch.stack([transform(digits.val[i][0]) for i in range(len(labels))])).numpy()
    assert accuracy.images == len(labels) == 359
    assert accuracy.top1 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1))
    assert accuracy.top5 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5))


def test_float_teacher_learns_the_digits(teacher: FloatModel) -> None:
    assert teacher.spec.metrics["val_top1"] > 85


def test_same_seed_same_weights_other_seed_others(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe
) -> None:
    tracking = replace(recipe, quantized=replace(recipe.hyperparameters("quantized"), track_oscillation=True))
    for name, seed, chosen in (("a", 1, recipe), ("b", 1, tracking), ("c", 2, recipe)):
        run(teacher, digits, chosen, Options(tmp_path / name, seed=seed))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    # Nothing is tracked that was not asked for, and what is tracked changes no weight.
    for name, is_tracked in (("a", False), ("b", True)):
        training = read_checkpoint(tmp_path / name / "last.pt")[2]
        assert training is not None
        assert (training["oscillation"] is not None) == is_tracked
        assert ["oscillating" in record for record in read_metrics(tmp_path / name)] == 2 * [is_tracked]


SOFT = ["quantized.distillation=soft", "quantized.reconstruct_first=true", "quantized.reconstruction_steps=5"]
SMALL = [*TEACHER, "quantized.epochs=2"]


@pytest.mark.parametrize("changes", [[], SOFT], ids=["labels", "soft_from_a_reconstruction"])
def test_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", [*SMALL, *changes])
    run(teacher, digits, recipe, Options(tmp_path / "whole"))
    calls = 0

    def stop_in_second_epoch(self: LabelLoss, *args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise KeyboardInterrupt
        return original(self, *args)

    from qvit.quantization.distill import DistillationLoss

    original = DistillationLoss.forward
    monkeypatch.setattr(DistillationLoss, "forward", stop_in_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, digits, recipe, Options(tmp_path / "cut"))
    monkeypatch.undo()
    first = read_metrics(tmp_path / "cut")
    assert len(first) == 1
    monkeypatch.setattr(methods, "reconstruct", None)  # what is trained already starts from nothing anew
    run(teacher, digits, recipe, Options(tmp_path / "cut", resume=True))
    assert read_metrics(tmp_path / "cut")[:1] == first  # its seconds too: it was not trained again
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    strip = [{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(tmp_path / "whole")]
    assert strip == [{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(tmp_path / "cut")]


def test_training_from_a_reconstruction_starts_where_it_ends(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(methods, "_fit", lambda student, *rest: started.append(copy.deepcopy(student.state_dict())))
    run(teacher, digits, load_recipe("digits", [*SMALL, *SOFT]), Options(tmp_path / "a"), "baseline")
    plain = load_recipe("digits", [*SMALL, SOFT[-1]])
    reconstructed = train_quantized(
        teacher, teacher, "reconstruct", (2, 2), "head", digits, plain, Options(tmp_path / "b"), Console(quiet=True)
    )
    assert same(started[0], reconstructed.model.state_dict())
    run(teacher, digits, plain, Options(tmp_path / "c"), "baseline")
    assert not same(started[0], started[1])


def test_reconstruction_needs_a_float_model(tmp_path: Path, teacher: FloatModel, digits: ImageSets) -> None:
    config = QuantConfig(4, 4, rectifier=None)
    float_model = FloatModel(quantize(teacher.model, config), replace(teacher.spec, quant_config=config.to_dict()))
    recipe = load_recipe("digits", [*SMALL, *SOFT])
    with pytest.raises(ConfigError, match="reconstruct_first learns from a float model"):
        train_quantized(float_model, None, "baseline", (2, 2), "head", digits, recipe, Options(tmp_path), Console())
    assert not list(tmp_path.iterdir())


def _killed_after_an_epoch(*command: str) -> None:
    write = loop._write_metrics

    def write_and_die(folder: Path, history: list[dict[str, float]]) -> None:
        write(folder, history)
        if history:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._write_metrics = write_and_die
    run_command(*command)


def test_killed_run_resumes_from_its_last_epoch(tmp_path: Path, teacher_file: Path) -> None:
    command = ["train", "vit_tiny_patch16_224", "--bits", "2", "--data", "digits", "--teacher", str(teacher_file)]
    command += ["--out", str(tmp_path / "run")]
    command += [argument for change in SMALL for argument in ("--set", change)]
    process = jobs.start(_killed_after_an_epoch, *command)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    load_checkpoint(tmp_path / "run" / "last.pt")
    first = read_metrics(tmp_path / "run")
    assert [record["epoch"] for record in first] == [1]
    done = run_command(*command, "--resume")
    assert done.status == 0, done.err
    assert [record["epoch"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert read_metrics(tmp_path / "run")[:1] == first  # its seconds too: it was not trained again


def test_nan_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvit.quantization.distill import DistillationLoss

    original, calls = DistillationLoss.forward, 0

    def poisoned(self: DistillationLoss, *args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, *args) * (float("nan") if calls == 30 else 1.0)

    monkeypatch.setattr(DistillationLoss, "forward", poisoned)
    recipe = load_recipe("digits", ["quantized.epochs=3"])
    with pytest.raises(
        NonFiniteLossError, match=r"epoch 2, step 8, first in the loss itself.*last.pt holds the end of epoch 1"
    ):
        run(teacher, digits, recipe, Options(tmp_path))
    model, spec = load_checkpoint(tmp_path / "last.pt")
    assert spec.metrics["val_top1"] > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_exploding_learning_rate_stops(tmp_path: Path, digits: ImageSets) -> None:
    recipe = load_recipe("digits", ["full_precision.lr=1e30", "full_precision.warmup_epochs=0"])
    spec = describe("vit_tiny_patch16_224", recipe.model_args, digits.classes, recipe.preprocessing)
    with pytest.raises(NonFiniteLossError, match="learning rate"):
        train_full_precision(spec, digits, recipe, Options(tmp_path), Console(quiet=True))
    assert not (tmp_path / "last.pt").exists()


def test_resume_refuses_another_model(tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe) -> None:
    run(teacher, digits, recipe, Options(tmp_path), "baseline")
    with pytest.raises(CheckpointError, match="another model or another run"):
        run(teacher, digits, recipe, Options(tmp_path, resume=True), "q-vit")


def test_training_without_a_teacher(tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe) -> None:
    result = train_quantized(
        teacher, None, "rectify", (4, 4), "token", digits, recipe, Options(tmp_path), Console(quiet=True)
    )
    assert result.accuracy.top1 > 70


def test_guided_method_needs_a_teacher(tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="give --teacher"):
        train_quantized(teacher, None, "q-vit", (4, 4), "head", digits, recipe, Options(tmp_path), Console())


def test_eight_bits_agree_with_the_float_model(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe
) -> None:
    result = train_quantized(
        teacher, teacher, "ptq", (8, 8), "head", digits, recipe, Options(tmp_path), Console(quiet=True)
    )
    loader = make_loader(digits.val, make_transform(teacher.spec.preprocessing), 359, shuffle=False)
    images = next(iter(loader)).images
    with torch.no_grad():
        agreement = (result.model.eval()(images).argmax(1) == teacher.model(images).argmax(1)).float().mean()
    assert agreement >= 0.99


def test_compiled_training_follows_the_eager_one(
    tmp_path: Path, digits: ImageSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are captured and differentiated as ever, and run without minutes in the C++ compiler.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    recipe = load_recipe("digits", [*TEACHER, "quantized.epochs=1", "model_args.depth=1", "quantized.batch_size=256"])
    spec = describe("vit_tiny_patch16_224", recipe.model_args, digits.classes, recipe.preprocessing)
    torch.manual_seed(0)
    float_model = FloatModel(create_model(spec).eval(), spec)
    for name in ("eager", "compile"):
        options = Options(tmp_path / name, compile=name == "compile")
        result = train_quantized(
            float_model, float_model, "q-vit", (8, 8), "head", digits, recipe, options, Console(quiet=True)
        )
    eager, compiled = (read_metrics(tmp_path / name)[0] for name in ("eager", "compile"))
    for name in ("train_loss", "distillation", "guided"):
        assert compiled[name] == pytest.approx(eager[name], rel=0.02)
    assert len(query_key_statistics(result.model, [torch.zeros(2, 1, 8, 8)])) == 1


def test_bf16_training_learns(tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe) -> None:
    run(teacher, digits, recipe, Options(tmp_path, precision="bf16"))
    assert read_metrics(tmp_path)[-1]["val_top1"] > 60
    assert all(value.dtype in (torch.float32, torch.uint8) for value in weights(tmp_path).values())


def test_corrupt_image_is_counted_in_the_metrics(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    from qvit.data.sources import open_data

    folder = image_folder(splits={"train": 40, "val": 4})
    (folder / "train" / "a" / "7.png").write_bytes(b"")
    recipe = load_recipe(
        "digits",
        [
            "model_args.in_chans=3",
            "preprocessing.mean=[0.5,0.5,0.5]",
            "preprocessing.std=[0.5,0.5,0.5]",
            "full_precision.epochs=1",
            "full_precision.batch_size=16",
        ],
    )
    data = open_data(str(folder))
    spec = describe("vit_tiny_patch16_224", recipe.model_args, data.classes, recipe.preprocessing)
    options = Options(tmp_path / "run", skip_corrupt=True)
    train_full_precision(spec, data, recipe, options, Console(quiet=True))
    # 80 images in 5 batches of 16: the broken one is always among them.
    assert read_metrics(tmp_path / "run")[0]["unreadable"] == 1


def test_scales_have_their_own_rate_and_no_weight_decay(teacher: FloatModel, recipe: Recipe) -> None:
    from qvit.config import QuantConfig
    from qvit.quantization.convert import quantize

    student = quantize(teacher.model, QuantConfig(2, 2))
    hyperparameters = replace(recipe.quantized, scale_lr=3.0, weight_decay=0.1)
    groups = parameter_groups(student, hyperparameters)
    names = {id(p): name for name, p in student.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    scale_names = {names[id(p)] for p in groups[-1]["params"]}
    assert groups[-1]["lr"] == pytest.approx(3 * hyperparameters.lr)
    assert all(part in ("log_scale", "offset", "gamma", "beta") for part in (n.rsplit(".", 1)[1] for n in scale_names))
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)


def test_metrics_and_tensorboard_are_written(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(teacher, digits, recipe, Options(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"train_loss", "distillation", "guided", "val_top1", "val_top5", "images_per_second", "lr"} <= set(lines[0])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("val_top1")] == pytest.approx([r["val_top1"] for r in lines])


def test_distillation_token_model_trains_both_heads(tmp_path: Path, digits: ImageSets) -> None:
    recipe = load_recipe("digits", [*TEACHER, "quantized.epochs=1"])
    spec = describe("deit_tiny_distilled_patch16_224", recipe.model_args, digits.classes, recipe.preprocessing)
    torch.manual_seed(0)
    float_model = FloatModel(create_model(spec).eval(), spec)
    result = train_quantized(
        float_model, float_model, "q-vit", (4, 4), "head", digits, recipe, Options(tmp_path), Console()
    )
    for head in ("head", "head_dist"):
        before = float_model.model.state_dict()[f"{head}.weight"]
        assert not torch.equal(before, result.model.state_dict()[f"{head}.weight"])
