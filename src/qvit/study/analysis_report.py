"""Files of an analysis: report, figures and ``analysis.json``, from its plain data."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from qvit._version import __version__
from qvit.analysis.figures import png, svg
from qvit.analysis.report import Cell, Section, Table, write_report
from qvit.analysis.report import Figure as ReportFigure
from qvit.config import bits_text
from qvit.files import write_atomically, write_text
from qvit.study import analysis_sections as sections
from qvit.study.analysis_sections import Drawing, Drawn, Part, Result


def write_analysis(out: Path, result: Result, drawn: Drawn) -> None:
    """Write ``analysis.json``, ``figures/NAME.svg`` and ``.png``, and ``report.html`` that holds all of it.

    Args:
        out: folder.
        result: what :func:`qvit.study.analysis.run_analysis` returns.
        drawn: pictures and maps.

    Raises:
        OutputError: if a file cannot be written.
    """
    written = []
    for heading, paragraphs, tables, drawings in _sections(result, drawn):
        shown = [_written(out / "figures" / drawing.name, drawing) for drawing in drawings]
        written.append(Section(heading, paragraphs, tables, shown))
    write_text(out / "analysis.json", json.dumps(result, indent=1) + "\n")
    write_report(out / "report.html", "Analysis", written)


def _written(path: Path, drawing: Drawing) -> ReportFigure:
    """Write a figure as SVG and PNG, and return it for the report."""
    pixels = png(drawing.figure)
    # By now everything has its place, which takes most of the time; letters of an SVG are a little narrower.
    drawing.figure.set_layout_engine("none")
    vector = svg(drawing.figure)
    write_text(path.with_suffix(".svg"), vector)
    write_atomically(path.with_suffix(".png"), lambda temporary: temporary.write_bytes(pixels))
    return ReportFigure(vector, drawing.caption, drawing.alt)


def _sections(result: Result, drawn: Drawn) -> Iterator[Part]:
    models: Mapping[str, Any] = result["models"]
    quantized = {name: model for name, model in models.items() if model["quantizers"]}
    yield _overview(result, models)
    yield sections.queries(result, models)
    yield sections.attention(result, models, drawn)
    if quantized:
        yield sections.noise(quantized)
    if result["study"] is not None:
        yield sections.bottleneck(result["study"])
    if quantized:
        yield sections.every_quantizer(quantized)
    yield (
        "How this was made",
        [
            f"qvit analyze on {result['source']}, {result['images']} images, with qvit {__version__}, PyTorch "
            f"{torch.__version__}, timm {timm.__version__} and Python {platform.python_version()} "
            f"on {platform.machine()}. analysis.json holds every number of this page, and figures/ every figure as SVG "
            "and PNG.",
            *(
                f"{name}: {model['architecture']}, SHA-256 of the weights {model['weights'][:16]}..."
                for name, model in models.items()
            ),
        ],
        [],
        [],
    )


def _overview(result: Result, models: Mapping[str, Any]) -> Part:
    labelled = any("top1" in model for model in models.values())
    compared = any("same_class" in model for model in models.values())
    rows: list[list[Cell]] = []
    for name, model in models.items():
        layers, noises = model["layers"], [noise["snr"] for noise in model["quantizers"] if noise["snr"] is not None]
        entropies = [layer["query_entropy"] for layer in layers if layer["query_entropy"] is not None]
        distances = [statistics.fmean(layer["attention_distance"]) for layer in layers if "attention_distance" in layer]
        rows.append(
            [
                name,
                "32" if model["bits"] is None else bits_text(model["bits"], model["overrides"]),
                model["method"],
                *([f"{model['top1']:.2f}" if "top1" in model else "–"] if labelled else []),
                *([f"{model['same_class']:.2f}" if "same_class" in model else "–"] if compared else []),
                f"{statistics.fmean(entropies):.2f}" if entropies else "–",
                f"{statistics.fmean(distances):.3f}" if distances else "–",
                f"{min(noises):.1f}" if noises else "–",
            ]
        )
    columns = [
        "model",
        "bits",
        "method",
        *(["top-1 (%)"] if labelled else []),
        *(["same class (%)"] if compared else []),
    ]
    columns += ["query entropy (bits)", "distance of maps", "lowest SNR (dB)"]
    reference = result["reference"]
    compared_with = (
        "No float model was among them, so nothing is compared with one (--teacher gives one)."
        if reference is None
        else f"What is compared is compared with {reference}."
    )
    return (
        "Models",
        [f"{len(models)} on the same {result['images']} images. {compared_with}"],
        [
            Table(
                columns,
                rows,
                "Same class: images to which a model gives the reference's class. Query entropy: of the codes, mean "
                "over layers and heads. Distance of maps: total variation between the attention maps of a model and "
                "the reference, 0 to 1, mean over layers and heads. Lowest SNR: of its worst quantizer.",
            )
        ],
        [],
    )
