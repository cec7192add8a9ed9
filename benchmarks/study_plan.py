"""The study's plan: which ablations, why, and with which recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from qvit.errors import ConfigError
from qvit.files import first_line
from qvit.train.recipe import Recipe, load_recipe


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One ablation of a plan.

    Args:
        name: and folder.
        why: the question it answers.
        bits: of weights and activations.
        seeds: of every cell.
        rows: names of the rows; ``None`` for all.
        set: changes of the recipe.
        overrides: bits of modules by name.
        ladder: see :func:`qvit.study.ablation.ablate`.
        table: whether it is shown as a table of methods.
        figures: whether its figures are drawn below the table.
        against: experiment whose runs of the same row, bits and seed it is compared with.
    """

    name: str
    why: str
    bits: list[int]
    seeds: list[int]
    rows: str | None = None
    set: list[str] = dataclasses.field(default_factory=list)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    ladder: bool = False
    table: bool = False
    figures: bool = False
    against: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study is made of.

    Args:
        model: timm's name.
        recipe: built-in recipe or file.
        set: changes of the recipe, for the teacher and all experiments.
        quantized: changes for all experiments that an experiment may change again.
        teacher: ``precision`` and ``compile`` of the teacher's training (:class:`qvit.train.loop.Options`).
        options: the same of all other runs.
        experiments: in the order in which they are run.
    """

    model: str
    recipe: str
    set: list[str]
    quantized: list[str]
    teacher: dict[str, Any]
    options: dict[str, Any]
    experiments: list[Experiment]

    def recipe_of(self, experiment: Experiment | None = None) -> Recipe:
        """Return the recipe of the teacher, or of an experiment."""
        changes = self.set + (self.quantized + experiment.set if experiment is not None else [])
        return load_recipe(self.recipe, changes)


def read_plan(path: Path) -> Plan:
    """Return the plan of a YAML file.

    Raises:
        ConfigError: if it is none, saying why.
    """
    try:
        data = yaml.safe_load(path.read_text())
        experiments = [Experiment(**experiment) for experiment in data.pop("experiments")]
        return Plan(**data, experiments=experiments)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no plan of a study: {first_line(error)}") from error
