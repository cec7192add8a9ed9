"""No function leaves anything behind in the models it is given: no hook, no other module in the place of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import qvit
from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.analysis.gradients import loss_gradients
from qvit.analysis.size import model_size, operations
from qvit.analysis.statistics import attention_distance, query_key_statistics
from qvit.data.sources import ImageSets
from qvit.errors import DataError, TeacherMismatchError
from qvit.models.queries import run_with_queries
from qvit.models.spec import create_model, describe
from qvit.study.ablation import ablate, rows_named, teacher_statistics
from qvit.train.methods import FloatModel, train_full_precision, train_quantized
from qvit.train.nonfinite import first_non_finite
from qvit.train.options import Options
from qvit.train.recipe import load_recipe

Batches = list[tuple[Tensor, Tensor]]


def traces(model: nn.Module) -> dict[str, Any]:
    """Return all that a function could leave behind: hooks of modules and weights by kind, and what modules there are.

    Every dictionary of a module or a weight whose name speaks of hooks is one of them, those of later versions of
    PyTorch included.
    """
    found: dict[str, Any] = {"modules": [(name, type(module)) for name, module in model.named_modules()]}
    for owner in (*model.modules(), *model.parameters(), *model.buffers()):
        kinds = {name for name in (*dir(type(owner)), *vars(owner)) if "hook" in name and name.startswith("_")}
        for kind in kinds:
            hooks = getattr(owner, kind)
            if isinstance(hooks, dict):
                found[kind] = found.get(kind, 0) + len(hooks)
    return found


def test_every_kind_of_hook_is_counted(vit: nn.Module) -> None:
    before = traces(vit)
    leave: list[Callable[[], object]] = [
        lambda: vit.blocks[0].register_forward_hook(lambda *_: None),  # type: ignore[index, union-attr]
        lambda: vit.norm.register_forward_pre_hook(lambda *_: None),  # type: ignore[operator, union-attr]
        lambda: vit.norm.register_full_backward_hook(lambda *_: None),  # type: ignore[operator, union-attr]
        lambda: vit.register_state_dict_pre_hook(lambda *_: None),
        lambda: vit.head.weight.register_hook(lambda gradient: gradient),  # type: ignore[operator, union-attr]
        lambda: vit.head.weight.register_post_accumulate_grad_hook(lambda p: None),  # type: ignore[operator, union-attr]
    ]
    for way in leave:
        way()
        assert traces(vit) != before
        before = traces(vit)


def model_functions(student: nn.Module, teacher: nn.Module, batches: Batches, tmp_path: Path) -> dict[str, Any]:
    """Return all that takes models and returns at once, by name."""
    images, labels = batches[0]

    def step(guided: bool) -> None:
        loss_fn = DistillationLoss(teacher, guided=guided)
        for _ in range(2):
            loss_fn(student.train(), images, labels).backward()

    def refused() -> None:
        with pytest.raises(TeacherMismatchError):
            DistillationLoss(teacher)(student, images[:, :, :8, :8], labels)

    def without_images() -> None:
        with pytest.raises(DataError):
            query_key_statistics(student, [])

    def broken() -> None:
        with pytest.raises(RuntimeError):
            run_with_queries(student, images[:, :2])

    def exported() -> None:
        settings = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
        settings |= {"crop_mode": "center", "interpolation": "bicubic"}
        qvit.export(student, tmp_path / "m.safetensors", preprocessing=settings, classes=list("0123456789"))

    return {
        "quantize": lambda: quantize(teacher),
        "calibrate": lambda: calibrate(student, [images]),
        "guided": lambda: step(True),
        "distilled": lambda: step(False),
        "statistics": lambda: [query_key_statistics(model, [images]) for model in (teacher, student)],
        "distance": lambda: attention_distance(teacher, student, [images]),
        "gradients": lambda: loss_gradients(student, DistillationLoss(teacher), batches),
        "operations": lambda: [operations(model, 16) for model in (teacher, student)],
        "size": lambda: model_size(student),
        "nonfinite": lambda: first_non_finite(student, lambda: student(images), loss_was_finite=True),
        "no images": without_images,
        "broken": broken,
        "export": exported,
    }


NAMES = list(model_functions(nn.Identity(), nn.Identity(), [(torch.zeros(1), torch.zeros(1))], Path()))


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_models_leave_nothing_behind(
    vit: nn.Module, images: Tensor, labels: Tensor, tmp_path: Path, name: str
) -> None:
    student = quantize(vit, QuantConfig(4))
    calibrate(student, [images])
    models = (vit, student)
    before = [traces(model) for model in models]
    model_functions(student, vit, [(images, labels)], tmp_path)[name]()
    assert [traces(model) for model in models] == before
    # Nor does what is made of them later inherit anything.
    assert [traces(later) for later in (copy.deepcopy(vit), quantize(vit, QuantConfig(4)))] == before


def test_runs_and_ablations_leave_nothing_behind(tmp_path: Path, digits: ImageSets) -> None:
    changes = [
        "model_args.depth=2",
        "model_args.patch_size=4",
        "quantized.batch_size=512",
        "quantized.calibration_images=64",
    ]
    recipe = load_recipe("digits", [*changes, "quantized.epochs=1", "full_precision.epochs=1"])
    console = Console(quiet=True)
    spec = describe("vit_tiny_patch16_224", recipe.model_args, digits.classes, recipe.preprocessing)
    clean = traces(create_model(spec))
    made = train_full_precision(spec, digits, recipe, Options(tmp_path / "float", cpu=True), console)
    teacher = FloatModel(made.model, made.spec)
    assert traces(teacher.model) == clean
    options = Options(tmp_path / "quantized", cpu=True)
    student = train_quantized(teacher, teacher, "q-vit", (4, 4), "head", digits, recipe, options, console).model
    options, rows = Options(tmp_path / "table", cpu=True), rows_named("ptq,q-vit-head")
    ablate(teacher, digits, recipe, options, console, bits=[2], seeds=[0], rows=rows)
    teacher_statistics(teacher, digits, options)
    assert traces(teacher.model) == clean
    assert traces(student) == traces(quantize(create_model(spec), QuantConfig(4, 4)))
