"""What a search has come to, for people: a table, a figure, one HTML file."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvit._version import __version__
from qvit.analysis.figures import svg
from qvit.analysis.report import Figure, Section, Table, write_report
from qvit.search.cost import UNITS
from qvit.search.figure import frontier_figure
from qvit.search.find import Found, Model
from qvit.search.products import WIDTHS

RULES = (
    "distance: of the outputs from the float model's, on pictures held out, calibrated and not trained; summed: the "
    "distances that each quantizer brings about alone, together. ms: of an image in the engine, the sum of what each "
    "product takes; timed: the whole model. MB: the packed file's tensors. G BOPs: 10^9 bit operations of an image, "
    "multiply-adds each times the bits of both its factors."
)
"""What the columns of a search's table are."""


def columns(found: Found) -> list[str]:
    """Return the headings of a search's table."""
    agrees = "cosine" if found.model.agreement.same_class is None else "same class (%)"
    return ["model", agrees, "distance", "summed", *(unit.name for unit in UNITS.values()), "timed"]


def rows(models: Sequence[Model]) -> list[list[str]]:
    """Return a row of the table for each model."""
    return [
        [
            model.title,
            f"{model.agreement.cosine:.4f}"
            if model.agreement.same_class is None
            else f"{model.agreement.same_class:.1f}",
            f"{model.distance:.3g}",
            f"{model.predicted:.3g}",
            *(f"{model.costs[name]:.3g}" for name in UNITS),
            "" if model.measured_ms is None else f"{model.measured_ms:.3g}",
        ]
        for model in models
    ]


def write_search_report(path: Path, found: Found, about: dict[str, Any]) -> None:
    """Write the report of a search.

    Args:
        path: of the HTML file.
        found: what was found.
        about: ``command``, ``model``, ``pictures`` and ``held_out``.

    Raises:
        OutputError: if the file cannot be written.
    """
    made = (
        f"{about['command']}, with qvit {__version__} and Python {platform.python_version()} on {platform.machine()}; "
        f"the engine with {found.threads} threads, {found.instruction_set}. {about['pictures']} pictures for the "
        f"scales, {about['held_out']} held out."
    )
    bits = [[name, *map(str, pair)] for name, pair in found.model.bits.items()]
    write_report(
        path,
        f"Bits of {about['model']}",
        [
            Section(
                "What was found",
                [made],
                [Table(columns(found), rows([found.model, *found.uniform]), RULES)],
                [
                    Figure(
                        svg(frontier_figure(found)),
                        "Distance of the outputs from the float model's, by what a model costs: what is found where "
                        "this is the only budget, and models whose layers all have the same bits.",
                        "Lines of distance against milliseconds and megabytes, of found and of uniform models",
                    )
                ],
            ),
            Section(
                "Bits",
                tables=[
                    Table(
                        ["product", "weights, keys or values", "inputs, queries or map"],
                        bits,
                        "Of each product of the network; the patch embedding and the heads have 8.",
                    )
                ],
            ),
            Section(
                "Sensitivity",
                tables=[
                    Table(
                        ["quantizer", *(f"{bits} bits" for bits in WIDTHS)],
                        [
                            [name, *(f"{by_bits[bits]:.2g}" for bits in WIDTHS)]
                            for name, by_bits in found.sensitivities.items()
                        ],
                        "Distance of the outputs from the float model's with this quantizer alone.",
                    )
                ],
            ),
            Section(
                "Other budgets",
                tables=[
                    Table(
                        columns(found),
                        [row for models in found.frontiers.values() for row in rows(models)],
                        "The models of the lines in the figure.",
                    )
                ],
            ),
        ],
    )
