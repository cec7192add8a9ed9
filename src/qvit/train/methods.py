"""The methods that are compared, and one run of each: a float model, or a quantized one made from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import set_seed
from rich.console import Console
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from qvit.config import QuantConfig, RectifierKind
from qvit.data.sources import ImageSets, open_data
from qvit.errors import ConfigError, TeacherMismatchError
from qvit.models.checkpoint import quantized_by, write_checkpoint
from qvit.models.spec import ModelSpec, check_class_name, create_model, describe, shape_of
from qvit.nn.quantizer import Quantizer
from qvit.quantization.calibrate import calibrate
from qvit.quantization.convert import quantize
from qvit.quantization.distill import DistillationLoss, check_guidance
from qvit.quantization.reconstruct import reconstruct
from qvit.train.batches import training_batches, training_images, validation_batches
from qvit.train.display import progress_bar
from qvit.train.evaluate import Accuracy, evaluate
from qvit.train.loop import LabelLoss, Loss, fit
from qvit.train.options import Options, make_accelerator, rank_of
from qvit.train.recipe import Hyperparameters, Recipe
from qvit.train.run import can_go_on


class Method(NamedTuple):
    """What a method consists of.

    Attributes:
        title: its name for people.
        rectified: whether queries and keys are rectified (IRM).
        guided: whether the loss is guided by the teacher's queries and keys (DGD).
        trained: whether labels and epochs follow.
        reconstructed: whether it learns from the float model's outputs alone, in place of training.
        adapt: exchanges parts of a quantized student before it is calibrated.
        initialize: sets its scales from batches of images, in place of calibration.
        loss: of a student with a teacher.
        against: the method whose result its own is compared with.
    """

    title: str
    rectified: bool
    guided: bool
    trained: bool = True
    reconstructed: bool = False
    adapt: Callable[[nn.Module], None] | None = None
    initialize: Callable[[nn.Module, Sequence[Tensor]], None] | None = None
    loss: type[DistillationLoss] = DistillationLoss
    against: str = "baseline"


METHODS: dict[str, Method] = {
    "ptq": Method("post-training", rectified=False, guided=False, trained=False),
    "reconstruct": Method("reconstructed", rectified=False, guided=False, trained=False, reconstructed=True),
    "baseline": Method("QAT baseline", rectified=False, guided=False),
    "rectify": Method("+ IRM", rectified=True, guided=False),
    "distill": Method("+ DGD", rectified=False, guided=True),
    "q-vit": Method("Q-ViT (both)", rectified=True, guided=True),
}


Overrides = Mapping[str, int | tuple[int, int]]
"""Bits of modules by name, see :class:`QuantConfig`."""


class FloatModel(NamedTuple):
    """A full-precision model and what it is; where a student starts from one, it may also be quantized."""

    model: VisionTransformer
    spec: ModelSpec


@dataclasses.dataclass
class Result:
    """What a run made and measured.

    Args:
        model: the trained model, with its last weights, or their average if the recipe has an ``ema_decay``.
        spec: what it is.
        accuracy: on the validation images, of these weights.
        history: one record per epoch; empty for post-training quantization.
    """

    model: VisionTransformer
    spec: ModelSpec
    accuracy: Accuracy
    history: list[dict[str, float]]


def open_images(
    model: str, recipe: Recipe, data: str, *, root: str | None = None, splits: str = "train,validation"
) -> tuple[ImageSets, ModelSpec]:
    """Open a data set for a model to be made, and return it with the model's spec.

    Args:
        model: timm's name.
        recipe: its arguments and preprocessing.
        data: see :func:`qvit.data.sources.open_data`, as ``root`` and ``splits``.
        root: folder of a timm data set or of ``"wds/"``.
        splits: names of the splits.

    Raises:
        ConfigError: for a model that cannot be made, or a preprocessing that cannot be meant.
        DataError: for images that cannot be found, or classes whose names are no text.
    """
    # The model first: a wrong name should not wait for a data set to be listed.
    spec = describe(model, recipe.model_args, ["a", "b"], recipe.preprocessing)
    sets = open_data(data, mode=spec.mode, root=root, splits=splits)
    spec.classes = sets.classes
    for name in sets.classes:  # what no packed file could hold should not be trained for days
        check_class_name(name)
    return sets, spec


def train_full_precision(
    spec: ModelSpec, data: ImageSets, recipe: Recipe, options: Options, console: Console
) -> Result:
    """Train a float model from scratch with the recipe's ``full_precision`` hyperparameters."""
    set_seed(options.seed)
    model = create_model(spec)
    hyperparameters = recipe.hyperparameters("full_precision")
    spec = dataclasses.replace(spec, recipe=recipe.to_dict())
    loss = LabelLoss(hyperparameters.label_smoothing)
    return _fit(model, loss, data, hyperparameters, recipe, spec, options, console)


def train_quantized(
    initial_model: FloatModel,
    teacher: FloatModel | None,
    method: str,
    bits: tuple[int, int],
    rectifier: RectifierKind,
    data: ImageSets,
    recipe: Recipe,
    options: Options,
    console: Console,
    overrides: Overrides | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> Result:
    """Quantize ``initial_model``, calibrate it and train it with the recipe's ``quantized`` hyperparameters.

    Args:
        initial_model: model whose weights the student starts from; a quantized one of other bits gives its rectifiers
            too, one that is quantized in the same way its scales as well.
        teacher: what the student is distilled from; it is moved to the device of the training. ``None`` to train
            against the labels alone.
        method: a key of ``methods``.
        bits: of weights and of activations.
        rectifier: which reading of IRM, for the methods that have it.
        data: training and validation images.
        recipe: see :class:`Recipe`.
        options: see :class:`Options`.
        console: where progress is shown.
        overrides: see :class:`QuantConfig`.
        methods: what there is to choose from.

    Raises:
        ConfigError: see :func:`make_student`; or if the recipe has no ``quantized``.
        TeacherMismatchError: see :func:`make_student`, as UnsupportedModelError.
    """
    chosen = methods[method]
    hyperparameters, device = recipe.hyperparameters("quantized"), make_accelerator(options).device
    reconstruct_first = hyperparameters.reconstruct_first and chosen.trained
    if reconstruct_first and teacher is None and initial_model.spec.quant_config is not None:
        raise ConfigError(
            "The recipe's reconstruct_first learns from a float model: give --teacher, or set it to false."
        )
    set_seed(options.seed)
    student, config = make_student(initial_model, teacher, method, bits, rectifier, overrides, methods)
    student = student.to(device)
    spec = dataclasses.replace(
        initial_model.spec, quant_config=config.to_dict(), method=method, metrics={}, recipe=recipe.to_dict()
    )
    if isinstance(student, VisionTransformerDistilled):
        student.set_distilled_training(teacher is not None)
    if chosen.initialize is not None:
        chosen.initialize(student, training_images(data, spec, hyperparameters.calibration_images, options))
    elif not all(module.calibrated for module in student.modules() if isinstance(module, Quantizer)):
        keep = chosen.rectified and (initial_model.spec.quant_config or {}).get("rectifier") == rectifier
        calibrate(
            student,
            training_images(data, spec, hyperparameters.calibration_images, options),
            rectifier_init="keep" if keep else hyperparameters.rectifier_init,
            weight_init=hyperparameters.weight_init,
        )
    goes_on = options.resume and can_go_on(options.out)
    if chosen.reconstructed or (reconstruct_first and not goes_on):
        float_model = (teacher or initial_model).model.to(device)
        _reconstruct(student, float_model, data, spec, hyperparameters, options, console)
    if not chosen.trained:
        val = validation_batches(data, spec, hyperparameters.batch_size, options)
        accuracy = evaluate(student, val, device, skip_corrupt=options.skip_corrupt)
        spec.metrics = _metrics(accuracy)
        if make_accelerator(options).is_main_process:
            write_checkpoint(options.out / "best.pt", spec, student)
        return Result(student.eval(), spec, accuracy, [])
    loss: Loss = LabelLoss()
    if teacher is not None:
        loss = chosen.loss(
            teacher.model,
            soft=hyperparameters.distillation == "soft",
            guided=chosen.guided,
            guided_weight=hyperparameters.guided_weight,
            guided_decay=hyperparameters.guided_decay,
            guided_layers=hyperparameters.guided_layers,
        )
    return _fit(student, loss, data, hyperparameters, recipe, spec, options, console)


def check_student(
    initial_model: FloatModel,
    teacher: FloatModel | None,
    method: str,
    bits: tuple[int, int],
    rectifier: RectifierKind,
    overrides: Overrides | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> None:
    """Refuse what :func:`make_student` refuses, before there is anything to train; takes no memory.

    Raises:
        ConfigError: as :func:`make_student`, and the others too.
    """
    spec = initial_model.spec
    with torch.device("meta"):
        shape = FloatModel(quantized_by(shape_of(spec), spec), spec)
        make_student(shape, teacher, method, bits, rectifier, overrides, methods)


def make_student(
    initial_model: FloatModel,
    teacher: FloatModel | None,
    method: str,
    bits: tuple[int, int],
    rectifier: RectifierKind,
    overrides: Overrides | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> tuple[VisionTransformer, QuantConfig]:
    """Return the student that :func:`train_quantized` trains, not calibrated, and how it is quantized.

    Raises:
        ConfigError: for a guided method without a teacher, bits outside 2..8, or an override that matches no layer.
        TeacherMismatchError: for a teacher of other classes, or of other depth or heads if the method is guided.
        UnsupportedModelError: for a model that cannot be quantized.
    """
    chosen = methods[method]
    if chosen.reconstructed and teacher is None and initial_model.spec.quant_config is not None:
        raise ConfigError("Method reconstruct learns from a float model: give --teacher.")
    if chosen.guided and teacher is None:
        raise ConfigError(f"Method {method} is guided by a teacher: give --teacher, or use baseline or rectify.")
    if teacher is not None and len(teacher.spec.classes) != len(initial_model.spec.classes):
        raise TeacherMismatchError(
            f"The teacher has {len(teacher.spec.classes)} classes, the student {len(initial_model.spec.classes)}."
        )
    if chosen.guided and teacher is not None:
        check_guidance(teacher.model, initial_model.model)
    config = QuantConfig(*bits, rectifier=rectifier if chosen.rectified else None, overrides=dict(overrides or {}))
    student = _student(initial_model, config)
    if chosen.adapt is not None:
        chosen.adapt(student)
    return student, config


def _reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    data: ImageSets,
    spec: ModelSpec,
    hyperparameters: Hyperparameters,
    options: Options,
    console: Console,
) -> None:
    with progress_bar(console) as bar:
        task = bar.add_task("reconstruction", total=hyperparameters.reconstruction_steps)
        reconstruct(
            student,
            teacher,
            training_images(data, spec, hyperparameters.reconstruction_images, options),
            steps=hyperparameters.reconstruction_steps,
            seed=options.seed,
            precision=options.precision,
            compile=options.compile,
            report=lambda progress: bar.update(task, completed=progress.step),
        )


def _student(initial_model: FloatModel, config: QuantConfig) -> VisionTransformer:
    """Return the student with the weights of ``initial_model``, and its scales if it is quantized in the same way."""
    if initial_model.spec.quant_config is None:
        return quantize(initial_model.model, config)
    student = quantize(create_model(dataclasses.replace(initial_model.spec, quant_config=None)), config)
    if next(student.parameters()).is_meta:  # shapes alone: see check_student
        return student
    # One that is quantized in the same way keeps its scales; as text, for the order of the overrides counts.
    same = json.dumps(initial_model.spec.quant_config) == json.dumps(config.to_dict())
    quantizers = tuple(f"{name}." for name, m in student.named_modules() if isinstance(m, Quantizer) and not same)
    carried = {
        name: value for name, value in initial_model.model.state_dict().items() if not name.startswith(quantizers)
    }
    student.load_state_dict(carried, strict=False)  # which may lack scales, and have rectifiers that this one lacks
    return student


def _fit(
    model: VisionTransformer,
    loss: Loss,
    data: ImageSets,
    hyperparameters: Hyperparameters,
    recipe: Recipe,
    spec: ModelSpec,
    options: Options,
    console: Console,
) -> Result:
    train = training_batches(
        data.train,
        spec,
        hyperparameters.batch_size,
        options,
        {**recipe.augmentation, **hyperparameters.augmentation},
        repeats=hyperparameters.repeated_augmentation,
        accumulate=options.accumulate,
        rank=rank_of(make_accelerator(options)),
    )
    val = validation_batches(data, spec, hyperparameters.batch_size, options)
    trained, history = fit(model, loss, train, val, hyperparameters, spec, options, console)
    last = history[-1]
    accuracy = Accuracy(last["val_top1"], last["val_top5"], int(last["val_images"]), int(last["unreadable"]))
    return Result(trained.eval(), spec, accuracy, history)


def _metrics(accuracy: Accuracy) -> dict[str, float]:
    return {"val_top1": accuracy.top1, "val_top5": accuracy.top5, "val_images": accuracy.images}
