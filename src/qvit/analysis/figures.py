"""Figures of distributions, training and ablations. Each is a Figure of its own: no pyplot, no global state."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from qvit.analysis.statistics import QueryKeyStatistics
from qvit.analysis.style import COLOURS, DASHES, DPI, FAINT, HATCHES, INK, MARKERS, STYLE, new_figure
from qvit.errors import ConfigError
from qvit.files import printable


def query_histograms(
    rows: Mapping[str, Sequence[QueryKeyStatistics]], layers: Sequence[int], operand: Literal["query", "key"] = "query"
) -> Figure:
    """Draw the paper's Figure 1: how queries are distributed, and the Gaussian N(mu, sigma^2) of the same moments.

    Args:
        rows: for each model, by its name, what :func:`qvit.analysis.statistics.query_key_statistics` returned.
        layers: index of the blocks to draw, a column each.
        operand: whether queries or keys are drawn.

    Raises:
        ConfigError: naming a block that a model does not have.
    """
    with rc_context(STYLE):
        figure = new_figure(1.6 + 3.1 * len(layers), 0.9 + 2.1 * len(rows))
        axes = figure.subplots(len(rows), len(layers), sharex="col", squeeze=False)
        for row, (name, all_layers) in enumerate(rows.items()):
            by_layer = {layer.layer: layer for layer in all_layers}
            for column, index in enumerate(layers):
                if index not in by_layer:
                    raise ConfigError(f"{name} has no block {index}: its blocks are 0 to {len(by_layer) - 1}.")
                _query_histogram(axes[row, column], by_layer[index], operand, COLOURS[row % len(COLOURS)])
            label = "\n".join(textwrap.fill(line, 22) for line in name.splitlines())
            axes[row, 0].set_ylabel(label, fontweight="bold")
        for column, index in enumerate(layers):
            axes[0, column].set_title(f"block {index}")
            axes[-1, column].set_xlabel(f"{operand} value")
    return figure


def training_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw training loss and validation top-1 over the epochs of several runs.

    Top-1 is drawn from a round number that the axis names: below all of it, or well below the worst run's best epoch if
    that is higher, for how a run came up from nothing matters less than where it ended.

    Args:
        curves: for each run, by its name, a record per epoch with ``epoch``, ``train_loss`` and ``val_top1`` (percent).
    """
    with rc_context(STYLE):
        figure = new_figure(10, 4)
        loss, top1 = figure.subplots(1, 2)
        for number, (name, records) in enumerate(curves.items()):
            for axes, key in ((loss, "train_loss"), (top1, "val_top1")):
                axes.plot(
                    [record["epoch"] for record in records],
                    [record[key] for record in records],
                    label=name,
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=DASHES[number % len(DASHES)],
                    linewidth=1.8,
                    marker="o" if len(records) == 1 else None,
                )
        best = [max(record["val_top1"] for record in records) for records in curves.values() if records]
        lowest = min((record["val_top1"] for records in curves.values() for record in records), default=0.0)
        ended, all_of_it = (math.floor((min(best, default=0.0) - 15) / 10) * 10, math.floor((lowest - 1) / 5) * 5)
        bottom = max(0, ended, all_of_it)
        top1.set_ylim(bottom=bottom)
        named = f"validation top-1 (%), axis from {bottom}" if bottom else "validation top-1 (%)"
        _label(figure, {loss: "training loss", top1: named}, "epoch")
    return figure


def block_errors(errors: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the error of every block's output, as bars beside one another for several models.

    Args:
        errors: for each model, by its name, the relative squared error by the block's name.
    """
    blocks = list(next(iter(errors.values())))
    with rc_context(STYLE):
        figure = new_figure(max(5.0, 1.6 + 0.55 * len(blocks)), 3.6)
        axes = figure.subplots()
        width = 0.8 / len(errors)
        for number, (name, by_block) in enumerate(errors.items()):
            axes.bar(
                [place + (number - (len(errors) - 1) / 2) * width for place in range(len(blocks))],
                [100 * by_block[block] for block in blocks],
                width,
                label=name,
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
            )
        axes.set_xticks(range(len(blocks)), [printable(block) for block in blocks], rotation=45, ha="right")
        axes.set_ylabel("relative squared error (%)")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(errors))
    return figure


def ablation_bars(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw top-1 by method, grouped by bits: the mean over seeds, and the standard deviation where there are several.

    Bars start at a round number below the lowest of them, which the axis names.

    Args:
        records: a run each: ``bits``, ``seed``, ``top1`` (percent) and ``method``, or ``title`` for its name in full
            as :func:`qvit.study.ablation.read_results` gives it. Methods are drawn in the order they come in.
    """
    runs: dict[tuple[int, str], list[float]] = {}
    for record in records:
        method = record["title"] if "title" in record else record["method"]
        runs.setdefault((record["bits"], method), []).append(record["top1"])
    widths = sorted({bits for bits, _ in runs}, reverse=True)
    methods = list(dict.fromkeys(method for _, method in runs))
    means = {cell: statistics.fmean(values) for cell, values in runs.items()}
    spreads = {cell: statistics.stdev(values) for cell, values in runs.items() if len(values) > 1}
    lowest, highest = (
        pick(mean + sign * spreads.get(cell, 0.0) for cell, mean in means.items())
        for pick, sign in ((min, -1), (max, 1))
    )
    bottom = max(0, math.floor((lowest - 0.15 * (highest - lowest) - 1) / 5) * 5)

    with rc_context(STYLE):
        figure = new_figure(max(6.0, 1.5 + len(widths) * (0.4 + 0.42 * len(methods))), 4.6)
        axes = figure.subplots()
        slot = 0.85 / len(methods)
        for number, method in enumerate(methods):
            for group, bits in enumerate(widths):
                if (bits, method) not in means:
                    continue
                mean, spread = means[bits, method], spreads.get((bits, method))
                x = group + (number - (len(methods) - 1) / 2) * slot
                axes.bar(
                    x,
                    mean - bottom,
                    0.9 * slot,
                    bottom,
                    color=COLOURS[number % len(COLOURS)],
                    hatch=HATCHES[number % len(HATCHES)],
                    edgecolor="white",
                )
                if spread is not None:
                    axes.errorbar(x, mean, spread, color=INK, capsize=3, linewidth=1.2)
                axes.annotate(
                    f"{mean:.1f}",
                    (x, mean + (spread or 0.0)),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
        axes.set_xticks(range(len(widths)), [f"{bits} bits" for bits in widths])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(bottom, highest + 0.08 * (highest - bottom))
        axes.set_ylabel("top-1 (%)" + (f", axis from {bottom}" if bottom else ""))
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        handles = [
            Patch(facecolor=COLOURS[n % len(COLOURS)], hatch=HATCHES[n % len(HATCHES)], edgecolor="white", label=m)
            for n, m in enumerate(methods)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(methods)), frameon=False)
    return figure


def layer_profiles(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw, over the layers, entropy of the query codes, attention distance, and the gradients of the loss's two terms.

    Args:
        rows: for each model, by its name, the ``layers`` of a record of :func:`qvit.study.ablation.read_results`.
    """
    with rc_context(STYLE):
        figure = new_figure(10, 7)
        entropy, distance, norms, cosines = figure.subplots(2, 2).flat
        for number, (name, layers) in enumerate(rows.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
            entropy.plot([layer["query_entropy"] for layer in layers], label=name, **style)
            distance.plot([layer["attention_distance"] for layer in layers], **style)
            trained = [layer["gradients"] for layer in layers if "gradients" in layer]
            norms.plot([gradients["labels"] for gradients in trained], **style)
            norms.plot([gradients["guided"] for gradients in trained], "--", **style)
            cosines.plot([gradients["cosine"] for gradients in trained], **style)
        norms.set_yscale("log")
        cosines.axhline(0, color="#808080", linewidth=0.8)
        bound = next(iter(rows.values()))[0]["query_bits"]
        titles = {
            entropy: f"entropy of the query codes (bits, at most {bound})",
            distance: "attention distance to the teacher",
            norms: "gradient norm: labels (solid), guidance (dashed)",
            cosines: "cosine between the two gradients",
        }
        _label(figure, titles, "block")
    return figure


def latency_bars(panels: Mapping[str, Mapping[str, float]], highlighted: Sequence[str]) -> Figure:
    """Draw how long runtimes take: a panel a case, a bar a runtime, shorter is faster.

    Args:
        panels: milliseconds by runtime, by the title of the case.
        highlighted: runtimes that are drawn in colour.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not panels:
        raise ConfigError("There are no timings to draw.")
    runtimes = list(dict.fromkeys(runtime for panel in panels.values() for runtime in panel))
    places = {runtime: place for place, runtime in enumerate(runtimes)}
    with rc_context(STYLE):
        figure = new_figure(2.6 + 3.4 * len(panels), 1.1 + 0.36 * len(runtimes))
        for axes, (title, panel) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
        ):
            for runtime, milliseconds in panel.items():
                emphasized = runtime in highlighted
                axes.barh(
                    places[runtime],
                    milliseconds,
                    color=COLOURS[0 if emphasized else -1],
                    alpha=1.0 if emphasized else 0.5,
                )
                axes.annotate(
                    f"{milliseconds:.3g}",
                    (milliseconds, places[runtime]),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
            axes.set_title(title)
            axes.set_xlabel("milliseconds")
            axes.margins(x=0.15)
            axes.grid(axis="x", color=FAINT, linewidth=0.8)
            axes.set_axisbelow(True)
        axes.set_yticks(range(len(runtimes)), [printable(runtime) for runtime in runtimes])
        axes.invert_yaxis()
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file, at twice the resolution of a plain screen."""
    return _saved(figure, format="png", dpi=2 * DPI)


def svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element, text as outlines, for a page or a file of its own."""
    text = _saved(figure, format="svg", metadata={"Date": None}).decode()
    return text[text.index("<svg") :]


def _saved(figure: Figure, **options: Any) -> bytes:
    """Return the file of a figure, in which names are text; a character that the font does not have is a box."""
    for text in figure.findobj(Text):
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        axis.set_major_formatter("{x:g}")  # by itself it writes TeX, which stays as it is
        axis.set_minor_formatter(LogFormatter())
    buffer = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _label(figure: Figure, titles: Mapping[Axes, str], counted: str) -> None:
    """Give panels of lines their titles, an axis of whole numbers and a grid; the first one's lines make the legend."""
    for axes, title in titles.items():
        axes.set_title(title)
        axes.set_xlabel(counted)
        axes.locator_params(axis="x", integer=True)
        axes.grid(color=FAINT, linewidth=0.8)
    handles, labels = next(iter(titles)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False)


def _query_histogram(axes: Axes, layer: QueryKeyStatistics, operand: str, colour: str) -> None:
    mu, sigma, entropy, bits = (getattr(layer, f"{operand}_{part}") for part in ("mean", "std", "entropy", "bits"))
    counts, edges = (layer.counts, layer.edges) if operand == "query" else (layer.key_counts, layer.key_edges)
    density = counts / (layer.values * np.diff(edges))
    axes.stairs(density, edges, fill=True, color=colour, alpha=0.45)
    gaussian = np.zeros(0)
    if sigma > 0:
        x = np.linspace(edges[0], edges[-1], 300)
        gaussian = np.exp(-0.5 * ((x - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        axes.plot(x, gaussian, color=INK, linewidth=1.4)
    lines = [f"μ = {mu:.3f}".replace("-", "−"), f"σ = {sigma:.3f}"]
    if entropy is not None:
        lines.append(f"H = {entropy:.2f} of {bits} bits")
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    axes.spines["left"].set_visible(False)
    # Room above the curves, for the text.
    axes.set_ylim(0, 1.45 * max(density.max(), gaussian.max(initial=0.0)))
    axes.text(0.98, 0.98, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=10)
