"""The HTML report of a quantization without labels."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from qvit._version import __version__
from qvit.analysis.figures import block_errors, svg
from qvit.analysis.report import Figure, Section, Table, write_report

_STEPS = {
    "calibrated": "scales and offsets set from the pictures",
    "reconstructed": "then all weights and scales trained to give the float model's outputs",
}


def write_quantization_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report of what :func:`qvit.study.quantization.run_quantization` returned.

    Raises:
        OutputError: if the file cannot be written.
    """
    weights, activations = result["bits"]
    others = ", ".join(f"{name} {'/'.join(map(str, pair))}" for name, pair in result["overrides"].items())
    measured: Mapping[str, Mapping[str, Any]] = result["agreement"]
    classifies = all(figures["same_class"] is not None for figures in measured.values())
    apart = "held out: no step saw them" if result["apart"] else "the only one there was, which the model was made with"
    columns = ["model", *(["same class (%)"] if classifies else []), "cosine of outputs", "largest block error"]
    rows = [
        [
            name,
            *([figures["same_class"]] if classifies else []),
            f"{figures['cosine']:.4f}",
            max(figures["blocks"].values()),
        ]
        for name, figures in measured.items()
    ]
    agreement = Section(
        "Agreement with the float model",
        [
            f"{result['model']} at {weights} bits for weights and {activations} for activations, from "
            f"{result['pictures']} pictures without labels. The packed file holds the {result['kept']} model.",
            *([f"Other bits, of weights and activations: {others}."] if others else []),
            *(f"{name}: {_STEPS[name]}." for name in measured),
        ],
        [
            Table(
                columns,
                rows,
                f"On {result['held_out']} pictures, {apart}. Block error: squared distance of a block's output from "
                "the float model's, by the squared distance of that from its mean.",
            )
        ],
        [
            Figure(
                svg(block_errors({name: figures["blocks"] for name, figures in measured.items()})),
                "Error of each block's output, all blocks before it quantized too. A block whose bar stands out is "
                "one to give more bits (--override 'NAME.*=8').",
                "Bars of the relative squared error of every block's output, before and after reconstruction",
            )
        ],
    )
    blocks = Section(
        "Blocks",
        tables=[
            Table(
                ["block", *measured],
                [
                    [name, *(f"{figures['blocks'][name]:.4f}" for figures in measured.values())]
                    for name in next(iter(measured.values()))["blocks"]
                ],
                "The errors of the figure.",
            )
        ],
    )
    ratio = result["float_bytes"] / result["bytes"]
    steps = f", {result['steps']} steps in {result['reconstruction_seconds']:.0f} s" if "steps" in result else ""
    made = Section(
        "How this was made",
        [
            f"qvit quantize {result['source']}, method {result['method']}{steps}, seed {result['seed']}, "
            f"{result['seconds'] / 60:.1f} minutes in all, with qvit {__version__}, PyTorch {torch.__version__}, timm "
            f"{timm.__version__} and Python {platform.python_version()} on {platform.machine()}. The packed file has "
            f"{result['bytes'] / 1e6:.2f} MB, {ratio:.1f} times less than the weights in float32. SHA-256 of the "
            f"weights: {result['checksum'][:16]}...."
        ],
    )
    write_report(path, f"{result['model']} at {weights} bits, without labels", [agreement, blocks, made])
