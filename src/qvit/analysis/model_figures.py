"""Figures of what :mod:`qvit.study.analysis` finds in models: attention, noise, and where few bits cost most."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from qvit.analysis.style import COLOURS, FAINT, HATCHES, INK, MARKERS, STYLE, new_figure
from qvit.files import printable

_SCALE = "cividis"
"""Colours from dark to light, evenly, for any kind of colour vision and in grey."""


def layer_curves(
    models: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]], bounds: Mapping[str, Sequence[int]]
) -> Figure:
    """Draw quantities over the attention layers, a panel each, a line per model.

    Args:
        models: names of all, in the order of their colours; not each need be in a panel.
        panels: by the panel's title with its unit, for each model by its name, a value per layer.
        bounds: for panels by title, values that a dotted line is drawn at.
    """
    with rc_context(STYLE):
        columns = min(2, len(panels))
        figure = new_figure(5.0 * columns, 0.6 + 3.0 * math.ceil(len(panels) / columns))
        grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
        for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
            for name, values in rows.items():
                axes.plot(values, **_line(models.index(name)))
            for bound in bounds.get(title, ()):
                axes.axhline(bound, color=INK, linestyle=":", linewidth=1)
                axes.annotate(
                    f"bound: {bound} bits",
                    (1, bound),
                    (-2, 2),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    fontsize=9,
                )
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
            _over_layers(axes, title)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, models, panels)
    return figure


def head_dots(models: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Draw a quantity of every head over the attention layers, a panel each: dots for heads, a line for their mean.

    Args:
        models: as of :func:`layer_curves`.
        panels: by the panel's title with its unit, for each model by its name, a list per layer of a value per head.
    """
    with rc_context(STYLE):
        figure = new_figure(5.0 * len(panels), 3.9)
        for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for place, (name, layers) in enumerate(rows.items()):
                style = _line(models.index(name))
                shift = 0.16 * (place - (len(rows) - 1) / 2)  # beside one another, not on top
                heads = [(layer + shift, value) for layer, values in enumerate(layers) for value in values]
                means = [float(np.mean(values)) for values in layers]
                axes.plot([layer + shift for layer in range(len(layers))], means, **{**style, "marker": None})
                axes.plot(*zip(*heads, strict=True), **{**style, "linestyle": "none", "alpha": 0.8})
            _over_layers(axes, title)
        _legend(figure, models, panels)
    return figure


def attention_overlays(
    pictures: Sequence[NDArray[np.uint8]], titles: Sequence[str], maps: Mapping[str, Sequence[NDArray[np.float32]]]
) -> Figure:
    """Draw pictures, and beside each where the models look at it.

    Args:
        pictures: ``(H, W, 3)`` each.
        titles: a line per picture.
        maps: for each model by its name, a map ``(rows, columns)`` a picture, of shares of the attention; all models'
            maps of one picture have one scale of colours.
    """
    with rc_context(STYLE):
        width = 1 + len(maps)
        figure = new_figure(0.9 + 2.1 * width, 0.7 + 2.25 * len(pictures))
        grid = figure.subplots(len(pictures), width, squeeze=False)
        for row, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            height, breadth = picture.shape[:2]
            most = max(float(by_picture[row].max()) for by_picture in maps.values())
            grid[row, 0].imshow(picture, interpolation="nearest")
            grid[row, 0].set_ylabel(textwrap.fill(printable(title), 24), fontsize=9)
            for column, by_picture in enumerate(maps.values(), 1):
                image = grid[row, column].imshow(
                    100 * by_picture[row],
                    cmap=_SCALE,
                    vmin=0,
                    vmax=100 * most,
                    extent=(0, breadth, height, 0),
                    interpolation="nearest",
                )
            bar = figure.colorbar(image, ax=list(grid[row]), shrink=0.85, pad=0.01)
            bar.set_label("attention (%)", fontsize=9)
            bar.outline.set_visible(False)
        for column, name in enumerate(["picture", *maps]):
            grid[0, column].set_title(textwrap.fill(printable(name), 20), fontsize=10)
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    return figure


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    counted: str,
    *,
    dark_is_bad: bool = True,
) -> Figure:
    """Draw a table of numbers as colours, each with its number.

    Args:
        values: a row each of a value per column; ``None`` is left empty.
        rows: names.
        columns: names.
        unit: of the values, beside the scale of colours.
        counted: what a column is.
        dark_is_bad: whether low values are those to look at, and dark; else high ones are dark.
    """
    table = np.array([[math.nan if value is None else value for value in row] for row in values])
    with rc_context(STYLE):
        height = 1.3 + 0.36 * len(rows)
        figure = new_figure(3.4 + max(3.0, 0.56 * len(columns)), height)
        axes = figure.subplots()
        colours = colormaps[_SCALE if dark_is_bad else f"{_SCALE}_r"].with_extremes(bad="#FFFFFF")
        image = axes.imshow(np.ma.masked_invalid(table), cmap=colours, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                axes.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=INK if light else "#FFFFFF",
                )
        axes.set_yticks(range(len(rows)), [printable(row) for row in rows])
        crowded = max(map(len, columns)) > 3
        axes.set_xticks(
            range(len(columns)),
            [printable(column) for column in columns],
            rotation=45 if crowded else 0,
            ha="right" if crowded else "center",
            rotation_mode="anchor",
        )
        axes.set_xlabel(counted)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(textwrap.fill(unit, round(9 * height)))
        bar.outline.set_visible(False)
    return figure


def part_bars(bars: Mapping[str, Mapping[str, float]], unit: str, reference: float | None, named: str) -> Figure:
    """Draw a number for each part of a model, bars beside one another.

    Args:
        bars: for each way of measuring by its name, a number by part.
        unit: of the numbers.
        reference: a dotted line is drawn at it, if there is one.
        named: what the line is.
    """
    parts = list(next(iter(bars.values())))
    slot, handles = 0.8 / len(bars), list[Any]()
    with rc_context(STYLE):
        figure = new_figure(8.4, 1.3 + (0.22 + 0.26 * len(bars)) * len(parts))
        axes = figure.subplots()
        for number, (name, by_part) in enumerate(bars.items()):
            places = [
                place + (number - (len(bars) - 1) / 2) * slot for place in range(len(parts)) if parts[place] in by_part
            ]
            values = [by_part[part] for part in parts if part in by_part]
            handles.append(
                axes.barh(
                    places,
                    values,
                    0.92 * slot,
                    label=name,
                    color=COLOURS[number],
                    hatch=HATCHES[number],
                    edgecolor="white",
                )
            )
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:.1f}",
                    (value, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
                )
        if reference is not None:
            label = f"{named}: {reference:.1f}"
            handles.append(axes.axvline(reference, color=INK, linestyle=":", linewidth=1.2, label=label))
        axes.set_yticks(range(len(parts)), parts)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel(unit)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _line(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _over_layers(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("attention layer")
    axes.locator_params(axis="x", integer=True)
    axes.grid(color=FAINT, linewidth=0.8)


def _legend(figure: Figure, models: Sequence[str], panels: Mapping[str, Mapping[str, Any]]) -> None:
    handles = [
        Line2D([], [], label=textwrap.fill(printable(name), 30), **_line(number))
        for number, name in enumerate(models)
        if any(name in rows for rows in panels.values())
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)), frameon=False)
