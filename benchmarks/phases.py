"""The engine's plan of phases, drawn as it is: which steps a task runs before all threads meet at a barrier.

Asked of the kernels (``_kernels.Model.schedule``) for two small models with random codes; nothing is timed.

Example: python benchmarks/phases.py docs/figures/phases.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import timm
import torch
from matplotlib.patches import Rectangle

from qvit import _kernels
from qvit.analysis.figures import svg
from qvit.analysis.style import COLOURS, INK, STYLE, new_figure
from qvit.bench.random_model import random_model
from qvit.files import write_text
from qvit.models.families import lower
from qvit.quantization.convert import quantize
from qvit.runtime.parts import program_parts

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeiT-T, two of its blocks": ("deit_tiny_patch16_224", {"depth": 2}),
    "Swin-T, two stages of two blocks": ("swin_tiny_patch4_window7_224", {"depths": (2, 2)}),
}
STEPS = {
    "embed": "embed",
    "project": "project to queries, keys, values",
    "attend": "attend",
    "feed_forward": "feed forward (MLP)",
    "norm": "norm",
    "merge": "merge patches",
}
"""What the kernels call a step, and the legend."""
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "--")
THREADS, LANES = 2, 4
"""Threads of the engine; tasks that are drawn, of a phase that has more."""
Phase = tuple[list[str], bool, list[tuple[int, int]]]


def schedule(name: str, arguments: dict[str, Any]) -> list[Phase]:
    """Return the phases of one image in timm's model ``name``: steps, whether windows, rows of each task."""
    with torch.device("meta"):
        program, _ = lower(quantize(timm.create_model(name, **arguments)), (224, 224))
    model = _kernels.Model(_kernels.instruction_sets()[0], *program.input, THREADS)
    for part in program_parts(program, random_model(program).tensors):
        model.add(part)
    return model.schedule(1)


def draw(axes: Any, title: str, phases: list[Phase]) -> float:
    """Draw the phases side by side and return their width: a lane for each task, a box for each of its steps."""
    kinds, x = list(STEPS), 0.0
    for steps, windows, tasks in phases:
        for lane in range(min(len(tasks), LANES)):
            for place, kind in enumerate(map(kinds.index, steps)):
                axes.add_patch(Rectangle((x + place, lane + 0.1), 1, 0.8, **look(kind)))
        middle = x + len(steps) / 2
        if len(tasks) > LANES:
            axes.text(middle, LANES + 0.4, "...", ha="center", va="center")
        sizes = sorted({count for _, count in tasks})
        rows = f"{sizes[0]} row{'s' * (sizes[0] > 1)}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} rows"
        about = [f"{len(tasks)} task{'s' * (len(tasks) > 1)}", f"of {rows}", *(["(windows)"] if windows else [])]
        axes.text(middle, -0.25, "\n".join(about), ha="center", va="bottom", fontsize=9)
        x += len(steps) + 0.25
        axes.plot([x, x], [-0.2, LANES + 0.8], color=INK, linewidth=2)
        x += 0.25
    axes.text(x, LANES / 2, "pooling\nand head", va="center", fontsize=9)
    axes.set(ylim=(LANES + 1, -2), yticks=[], xticks=[])
    axes.set_title(title, loc="left")
    axes.spines[:].set_visible(False)
    return x


def look(kind: int) -> dict[str, Any]:
    """Return how the boxes of a kind of steps look."""
    return {"facecolor": COLOURS[kind], "hatch": HATCHES[kind], "edgecolor": "white", "linewidth": 0.8}


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    with mpl.rc_context(STYLE):
        figure = new_figure(10, 5.6)
        panels: Any = figure.subplots(len(MODELS), 1, sharex=True)
        plans = {title: schedule(name, settings) for title, (name, settings) in MODELS.items()}
        widths = [draw(axes, *plan) for axes, plan in zip(panels, plans.items(), strict=True)]
        panels[0].set_xlim(-0.2, max(widths) + 1.4)
        drawn = {step for phases in plans.values() for steps, _, _ in phases for step in steps}
        legend: list[Any] = [
            Rectangle((0, 0), 1, 1, **look(kind), label=label)
            for kind, (step, label) in enumerate(STEPS.items())
            if step in drawn
        ]
        legend += panels[0].plot([], [], color=INK, linewidth=2, label="barrier: all threads meet")
        figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
        write_text(arguments.figure, svg(figure))


if __name__ == "__main__":
    main()
