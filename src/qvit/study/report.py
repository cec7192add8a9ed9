"""Figures and HTML report of an ablation, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from qvit.analysis.figures import ablation_bars, layer_profiles, query_histograms, svg, training_curves
from qvit.analysis.report import Figure as ReportFigure
from qvit.analysis.report import Section, Table, write_report
from qvit.analysis.statistics import QueryKeyStatistics
from qvit.study.ablation import MEASURED, mean_and_spread, summarise

Record = Mapping[str, Any]
_HISTOGRAMS = ("baseline", "rectify-head", "q-vit-head")
"""Rows whose queries are drawn, below those of the float model."""


class Drawing(NamedTuple):
    """A figure with a name for its file and a caption."""

    name: str
    caption: str
    figure: Figure


def ablation_figures(records: Sequence[Record], teacher: Sequence[QueryKeyStatistics] = ()) -> list[Drawing]:
    """Draw an ablation: top-1, and for the fewest bits and the first seed curves, queries and the mechanism by block.

    Args:
        records: what :func:`qvit.study.ablation.read_results` returns.
        teacher: statistics of the float model, drawn above those of the others; may be empty.
    """
    bits, seed = min(record["bits"] for record in records), min(record["seed"] for record in records)
    chosen = [r for r in records if (r["bits"], r["seed"]) == (bits, seed) and r["history"]]
    drawings = [
        Drawing("bars", "Top-1 by method; lines are standard deviations over the seeds.", ablation_bars(records))
    ]
    if not chosen:
        return drawings
    of = f"{bits} bits, seed {seed}"
    curves = {record["title"]: record["history"] for record in chosen}
    layers = {record["title"]: record["layers"] for record in chosen}
    queries = {"full precision": list(teacher)} if teacher else {}
    for record in chosen:
        if record["row"] in _HISTOGRAMS:
            queries[record["title"]] = [QueryKeyStatistics.from_dict(layer) for layer in record["layers"]]
    drawings.append(Drawing("curves", f"Training loss and validation top-1 ({of}).", training_curves(curves)))
    if queries:
        blocks = range(len(chosen[0]["layers"]))
        shown = sorted({0, len(blocks) // 3, 2 * len(blocks) // 3, len(blocks) - 1})
        caption = f"Queries, rectified where IRM is on, and the Gaussian of the same moments ({of})."
        drawings.append(Drawing("queries", caption, query_histograms(queries, shown)))
    caption = (
        f"By block ({of}): entropy of the query codes, distance of the attention maps to the teacher's, and at the end "
        "of the training the gradients of the loss's two terms with respect to query and key weights, guidance with "
        "the recipe's lambda (also for methods that train without it)."
    )
    drawings.append(Drawing("layers", caption, layer_profiles(layers)))
    return drawings


def write_ablation_report(
    path: Path, records: Sequence[Record], teacher_top1: float | None, teacher: Sequence[QueryKeyStatistics] = ()
) -> None:
    """Write the table and the figures of an ablation as one HTML file.

    Raises:
        OutputError: if the file cannot be written.
    """
    rows = [
        [
            row["bits"],
            row["title"],
            row["seeds"],
            mean_and_spread(row["top1"], row["top1_std"]),
            "" if row["gain"] is None else mean_and_spread(row["gain"], row["gain_interval"], "+"),
            f"{row['query_entropy']:.2f} of {row['bits']}",
            f"{row['attention_distance']:.3f}",
        ]
        for row in summarise(records)
    ]
    columns = ("bits", "method", "seeds", "top-1 (%)", "gain over its baseline", "query entropy", "attention distance")
    caption = (
        "Mean and standard deviation over the seeds; a gain is the mean of the differences seed by seed, with its 95 % "
        f"interval. {MEASURED}"
    )
    float_model = "" if teacher_top1 is None else f"In full precision the model reaches {teacher_top1:.2f} %."
    figures = [ReportFigure(svg(d.figure), d.caption, d.caption) for d in ablation_figures(records, teacher)]
    sections = [
        Section("Accuracy", [float_model] if float_model else [], [Table(columns, rows, caption)], figures[:1]),
        *([Section("What happens inside", figures=figures[1:])] if figures[1:] else []),
    ]
    write_report(path, "Ablation", sections)
