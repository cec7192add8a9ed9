"""The frontier: how far models are from the float model, by what they cost."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.figure import Figure

from qvit.analysis.style import COLOURS, DASHES, FAINT, MARKERS, STYLE, new_figure
from qvit.search.cost import UNITS
from qvit.search.find import Found


def frontier_figure(found: Found) -> Figure:
    """Draw the distance of the outputs against milliseconds and megabytes: what is found, and models of one width."""
    with rc_context(STYLE):
        figure = new_figure(1 + 4.6 * len(found.frontiers), 4.2)
        panels = figure.subplots(1, len(found.frontiers), sharey=True, squeeze=False)[0]
        for axes, (cost, models) in zip(panels, found.frontiers.items(), strict=True):
            series = {"found, this budget alone": models, "all layers alike": found.uniform, "found": [found.model]}
            for number, (name, members) in enumerate(series.items()):
                axes.plot(
                    [model.costs[cost] for model in members],
                    [model.distance for model in members],
                    linestyle=DASHES[number] if len(members) > 1 else "none",
                    marker=MARKERS[number],
                    color=COLOURS[number],
                    label=name,
                )
            for model in found.uniform:
                place = model.costs[cost], model.distance
                axes.annotate(model.title, place, (6, 4), textcoords="offset points", fontsize=9)
            axes.set_yscale("log")
            axes.set_xlabel(UNITS[cost].name)
            axes.grid(color=FAINT, linewidth=0.8)
        panels[0].set_ylabel("distance from the float model")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure
