"""The models and images of an analysis, as its user names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import Dataset

from qvit.data.pictures import open_pictures
from qvit.data.sources import ImageSets, check_classes, open_data
from qvit.errors import ConfigError
from qvit.models.checkpoint import load_checkpoint
from qvit.models.spec import ModelSpec, same_architecture
from qvit.train.methods import FloatModel

CALIBRATION_IMAGES = 512


class Subject(NamedTuple):
    """A model that is looked at, and what it is called."""

    name: str
    model: nn.Module
    spec: ModelSpec


class Material(NamedTuple):
    """The images of an analysis.

    Args:
        images: that the models are looked at with.
        calibration: others, to set scales on.
        classes: their names by label; ``None`` where the labels say nothing.
        data: what both are of, to train on; ``None`` where there are no labels.
    """

    images: Dataset[Any]
    calibration: Dataset[Any]
    classes: Sequence[str] | None = None
    data: ImageSets | None = None


def open_subjects(paths: Sequence[Path]) -> list[Subject]:
    """Return the models of some checkpoints, called by the end of their paths, as much of it as tells them apart.

    Raises:
        ConfigError: if they are not of one architecture, classes and preprocessing, or one is given twice.
        CheckpointError: as :func:`load_checkpoint`.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    depth = next((n for n in range(1, 99) if len({path.parts[-n:] for path in absolute}) == len(absolute)), 1)
    subjects: list[Subject] = []
    for path, whole in zip(paths, absolute, strict=True):
        model, spec = load_checkpoint(path)
        if whole in absolute[: len(subjects)]:
            raise ConfigError(f"{path} is given twice.")
        first = subjects[0].spec if subjects else spec
        for what, alike in (
            ("architecture", same_architecture(first, spec)),
            ("classes", first.classes == spec.classes),
            ("preprocessing", first.preprocessing == spec.preprocessing),
        ):
            if not alike:
                raise ConfigError(
                    f"{path} and {paths[0]} differ in their {what}: analyze models of one architecture together, on "
                    "images that are prepared in one way."
                )
        subjects.append(Subject(str(Path(*whole.parts[-depth:])), model, spec))
    return subjects


def teacher_for(subjects: Sequence[Subject], teacher: FloatModel, source: str) -> Subject:
    """Return a float model, which was given as ``source``, as one to compare the subjects with.

    Raises:
        ConfigError: if it is of another architecture.
    """
    spec = subjects[0].spec
    if not same_architecture(teacher.spec, spec):
        raise ConfigError(
            f"{source} holds a {teacher.spec.name} with {teacher.spec.model_args}, the checkpoints a {spec.name} with "
            f"{spec.model_args}: what is compared is of one architecture."
        )
    return Subject(f"teacher ({Path(source).name})", *teacher)


def labelled_images(source: str, spec: ModelSpec, *, root: str | None, splits: str) -> Material:
    """Return a data set whose classes are a model's: its validation images are looked at.

    Args:
        source: as of :func:`open_data`, like ``root`` and ``splits``.
        spec: of the model.
        root: folder of a timm data set.
        splits: names of the splits.

    Raises:
        ConfigError: if the model has no classes.
        DataError: as :func:`open_data`, or if the classes are others.
    """
    if not spec.classes:
        raise ConfigError("A feature extractor has no classes, for which --data has labels: give --images FOLDER.")
    sets = open_data(source, mode=spec.mode, root=root, splits=splits)
    check_classes(f"the data set {source}", sets.classes, "the checkpoint", spec.classes)
    return Material(sets.val, sets.train, spec.classes, sets)


def pictures_of(folder: str, spec: ModelSpec, seed: int) -> tuple[Material, str]:
    """Return the pictures of a folder, a fifth of which is looked at, and a remark about what was left out of it.

    Raises:
        DataError: as :func:`open_pictures`.
    """
    chosen = open_pictures(Path(folder), spec.mode, count=CALIBRATION_IMAGES, held_out=10**9, seed=seed)
    return Material(chosen.held_out, chosen.used), chosen.remark
