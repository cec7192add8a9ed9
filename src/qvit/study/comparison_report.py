"""What a comparison of two models found: for the terminal, and as a report with the images on which they differ."""

from __future__ import annotations

import io
import json
import platform
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch.utils.data import Dataset

from qvit._version import __version__
from qvit.analysis.paired import Difference
from qvit.analysis.report import Cell, Figure, Section, write_report
from qvit.analysis.report import Table as ReportTable
from qvit.data.datasets import Images, Unreadable
from qvit.files import printable, write_text
from qvit.runtime.preprocess import fit
from qvit.study.comparison import Comparison

TITLES = ("A", "B")
_EDGE = 160
"""Pixels of a thumbnail's longer side."""
_PAGE, _RECORD = "report.html", "report.json"


def pages(folder: Path) -> list[Path]:
    """Return the files that a report in a folder is."""
    return [folder / _PAGE, folder / _RECORD]


def comparison_table(comparison: Comparison) -> Table:
    """Return a line per model, for the terminal."""
    table = Table(title=printable(f"A and B on {comparison.source}"), title_justify="left")
    for column in _columns(comparison):
        table.add_column(column, justify="left" if column in ("model", "bits", "timed in") else "right")
    for row in _rows(comparison):
        table.add_row(*map(printable, row))
    return table


def sentences(comparison: Comparison) -> list[str]:
    """Return which models they are and what the numbers say: agreement, and with labels the difference and its test."""
    paired = comparison.paired
    said = [f"{title}: {side.path}, {side.spec.name}." for title, side in zip(TITLES, comparison.sides, strict=True)]
    said += [
        f"Both give the same class to {paired.agreement} % of {paired.images} images; in brackets is a 95 % interval."
    ]
    if paired.right is not None:
        alone = paired.right.first + paired.right.second
        said.append(
            f"B's accuracy less A's: {paired.gain} points. A alone is right on {paired.right.first} images, B alone on "
            f"{paired.right.second}: p = {paired.p_value:.3g} (McNemar's test, exact: how often two models that are "
            f"equally good would divide these {alone} images as unevenly or more)."
        )
    if paired.unreadable:
        said.append(f"Unreadable images skipped: {paired.unreadable}.")
    return said


def write_comparison_report(folder: Path, comparison: Comparison) -> Path:
    """Write the report and its figures as plain data; return the page's path.

    Raises:
        OutputError: if they cannot be written.
    """
    write_text(folder / _RECORD, json.dumps(comparison.to_dict(), indent=1))
    write_report(folder / _PAGE, "Two models on the same images", _sections(comparison))
    return folder / _PAGE


def _columns(comparison: Comparison) -> list[str]:
    accuracy = [] if comparison.paired.right is None else ["top-1 (%)"]
    return ["model", "bits", *accuracy, "MB", "ms", "timed in"]


def _rows(comparison: Comparison) -> list[list[str]]:
    """Return a line of text per model."""
    accuracies = comparison.paired.top1
    return [
        [
            title,
            side.bits,
            *([] if accuracies is None else [str(accuracies[number])]),
            f"{side.size / 1e6:.3f}",
            f"{1e3 * seconds:.2f}",
            side.timed_in,
        ]
        for number, (title, side, seconds) in enumerate(zip(TITLES, comparison.sides, comparison.seconds, strict=True))
    ]


def _sections(comparison: Comparison) -> list[Section]:
    paired, right = comparison.paired, comparison.paired.right
    caption = (
        "bits: of a packed file, those of most layers. MB: of a packed file, or of a checkpoint's model with its codes "
        f"at their width. ms: median of one image on {comparison.threads} thread(s), both models by turns; a quantized "
        "checkpoint is timed as the packed file that it becomes. What is in brackets is a 95 % interval."
    )
    tables = [ReportTable(_columns(comparison), _rows(comparison), caption)]
    if right is not None:
        cells: list[list[Cell]] = [["A right", right.both, right.first], ["A wrong", right.second, right.neither]]
        tables.append(ReportTable(["images", "B right", "B wrong"], cells, "Each image once."))
    kinds = {"Other classes": paired.images - paired.same}
    if right is not None:
        kinds = {"A alone is right": right.first, "B alone is right": right.second, "Neither is right": right.neither}
    differences = [
        Section(
            kind,
            [f"{count} images. To these A and B give other classes (some, chosen at random, as A sees them):"],
            thumbnails=[_thumbnail(comparison, difference) for difference in kept],
        )
        for (kind, count), kept in zip(kinds.items(), paired.differences, strict=True)
    ]
    versions = f"qvit {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    made = (
        f"qvit compare {comparison.sides[0].path} {comparison.sides[1].path} on {comparison.source}, with {versions}."
    )
    return [Section("Result", sentences(comparison), tables), *differences, Section("How this was made", [made])]


def _thumbnail(comparison: Comparison, difference: Difference) -> Figure:
    spec, name = comparison.sides[0].spec, _name(comparison.images, difference.image)
    first, second = (spec.classes[number] for number in difference.classes)
    label = "" if difference.label is None else f"is {spec.classes[difference.label]}, "
    caption = f"{name}: {label}A says {first}, B says {second}"
    item = comparison.images[difference.image]
    assert not isinstance(item, Unreadable)  # it was read before
    pixels = fit(item[0], spec.preprocessing).transpose(1, 2, 0)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    scale = max(1, _EDGE // max(image.size))  # a small one is shown pixel by pixel
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    image.thumbnail((_EDGE, _EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Figure(buffer.getvalue(), caption, caption)


def _name(images: Dataset[Any], number: int) -> str:
    """Return what an image is called: its file and the folder that it is in, or else its number."""
    source = images.sources[number] if isinstance(images, Images) else None
    return "/".join(Path(source).parts[-2:]) if isinstance(source, str) else f"image {number}"
