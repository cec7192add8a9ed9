"""What the report of an analysis says: tables and figures of its plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qvit.analysis.bottleneck import EVERYTHING, PARTS
from qvit.analysis.figures import query_histograms
from qvit.analysis.model_figures import attention_overlays, head_dots, heat_map, layer_curves, part_bars
from qvit.analysis.noise import QuantizerNoise, worst
from qvit.analysis.report import Table
from qvit.analysis.statistics import QueryKeyStatistics

_OPERANDS: tuple[tuple[Literal["query", "key"], str], ...] = (("query", "queries"), ("key", "keys"))
WORST = 10
"""Quantizers that the report names for each model."""
Result = Mapping[str, Any]


class Drawn(NamedTuple):
    """What the attention maps are drawn of.

    Args:
        pictures: ``(H, W, 3)`` uint8 each.
        titles: a line per picture.
        maps: for each attention layer and model, a map ``(rows, columns)`` a picture.
    """

    pictures: list[NDArray[np.uint8]]
    titles: list[str]
    maps: dict[int, dict[str, list[NDArray[np.float32]]]]


class Drawing(NamedTuple):
    """A figure, the name of its files, and what stands under it."""

    name: str
    figure: Figure
    caption: str
    alt: str


Part = tuple[str, list[str], list[Table], list[Drawing]]


def queries(result: Result, models: Mapping[str, Any]) -> Part:
    """Distributions of queries and keys: histograms, entropy against its bound, divergence from the reference."""
    rows = {name: [QueryKeyStatistics.from_dict(layer) for layer in model["layers"]] for name, model in models.items()}
    drawings = [
        Drawing(
            operand,
            query_histograms(rows, result["blocks"], operand),
            f"Values of the {what} just before they are quantized, rectified where they are, and the Gaussian of the "
            "same mean μ and deviation σ (the paper's Figure 1); H is the entropy of the codes.",
            f"Histograms of {what} with fitted Gaussians, a row per model, a column per block",
        )
        for operand, what in _OPERANDS
    ]
    panels: dict[str, dict[str, list[float]]] = {}
    bounds: dict[str, list[int]] = {}
    for operand, _ in _OPERANDS:
        title = f"entropy of the {operand} codes (bits)"
        with_codes = {name: layers for name, layers in rows.items() if layers[0].query_bits is not None}
        if with_codes:
            panels[title] = {
                n: [getattr(layer, f"{operand}_entropy") for layer in layers] for n, layers in with_codes.items()
            }
            bounds[title] = sorted(
                {getattr(layer, f"{operand}_bits") for layers in with_codes.values() for layer in layers}
            )
    for operand, what in _OPERANDS:
        compared = {n: model["layers"] for n, model in models.items() if "query_divergence" in model["layers"][0]}
        if compared:
            title = f"divergence of the {what} (bits)"
            panels[title] = {
                name: [layer[f"{operand}_divergence"] for layer in layers] for name, layers in compared.items()
            }
    if panels:
        drawings.append(
            Drawing(
                "layers",
                layer_curves(list(models), panels, bounds),
                "By attention layer. Entropy: mean over the heads, with its bound, the bits of the codes. Divergence: "
                "Kullback-Leibler, of the reference's distribution from the model's, over the bins of the histograms "
                "above, which are the reference's, and one more for all values outside of them.",
                "Entropy of query and key codes against its bound, and divergence from the reference, by layer",
            )
        )
    return "Queries and keys", [], [], drawings


def attention(result: Result, models: Mapping[str, Any], drawn: Drawn) -> Part:
    """How far attention reaches, how far maps are from the reference's, and maps over pictures."""
    height, width = result["image_size"]
    panels = {
        f"attention range (pixels of {height} x {width})": {
            name: [layer["attention_range"] for layer in model["layers"]] for name, model in models.items()
        }
    }
    compared = {name: model for name, model in models.items() if "attention_distance" in model["layers"][0]}
    if compared:
        panels["distance of the maps to the reference's (0 to 1)"] = {
            name: [layer["attention_distance"] for layer in model["layers"]] for name, model in compared.items()
        }
    drawings = [
        Drawing(
            "heads",
            head_dots(list(models), panels),
            "Dots are heads, lines their mean. Range: mean distance between a patch and those that it attends to, "
            "weighted by the attention; tokens that are nowhere in the image are left out. Distance: total variation "
            "between the rows of the maps.",
            "Attention range and distance of the attention maps, a dot a head, by layer",
        )
    ]
    for layer, maps in drawn.maps.items():
        if drawn.pictures:
            drawings.append(
                Drawing(
                    f"maps-{layer}",
                    attention_overlays(drawn.pictures, drawn.titles, maps),
                    f"Block {layer}: how much attention each patch gets, in percent of an image's, mean over the "
                    "heads: from the class token where there is one, else from all patches.",
                    f"Pictures and the attention maps of block {layer}, a column per model",
                )
            )
    return "Attention", [], [], drawings


def noise(models: Mapping[str, Any]) -> Part:
    """Signal to noise of every quantizer, the worst of each model by name and what to try."""
    tables, drawings = [], []
    for number, (name, model) in enumerate(models.items()):
        noises = [QuantizerNoise(**noise) for noise in model["quantizers"]]
        tables.append(
            Table(
                ["quantizer", "bits", "SNR (dB)", "what else", "what to try"],
                [[n.name, n.bits, f"{n.snr:.1f}", n.complaints or "–", _advice(n)] for n in worst(noises, WORST)],
                f"{name}: the {WORST} quantizers with the least signal to noise.",
            )
        )
        blocks, roles, values = _by_block(noises)
        drawings.append(
            Drawing(
                f"noise-{number}",
                heat_map(values, roles, blocks, "signal to quantization noise (dB)", "block"),
                f"{name}: signal to noise of every quantizer inside the blocks, in dB; dark is where it breaks.",
                f"Heat map of the signal to quantization noise of {name}, a row per quantizer, a column per block",
            )
        )
    return (
        "Where it breaks",
        [
            "Signal to quantization noise: ten times the logarithm of the values' squared distance from their mean by "
            "that from their quantized values; 6 dB are one bit. qvit quantize, train and ablate take what is to be "
            "tried. Where values are clipped, more pictures to calibrate on help too, and training. What noise costs "
            "is another matter, which the bottleneck study tells.",
        ],
        tables,
        drawings,
    )


def _advice(noise: QuantizerNoise) -> str:
    return (
        "it has 8 bits: train it, or calibrate on more pictures"
        if noise.override is None
        else f"--override '{noise.override}'"
    )


def _by_block(noises: Sequence[QuantizerNoise]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return blocks, roles of quantizers inside them, and the signal to noise of each, a row a role."""
    found: dict[tuple[str, str], float | None] = {}
    for noise in noises:
        block, _, rest = (
            noise.name.partition(".blocks.") if ".blocks." in noise.name else noise.name.partition("blocks.")
        )
        if rest:
            number, _, role = rest.partition(".")
            where = f"{block.rpartition('.')[2]}.{number}" if block else number  # of stages, the stage's number first
            found[where, role.removesuffix("_quantizer")] = noise.snr
    blocks, roles = (list(dict.fromkeys(key[side] for key in found)) for side in (0, 1))
    return blocks, roles, [[found.get((block, role)) for block in blocks] for role in roles]


def bottleneck(study: Mapping[str, Any]) -> Part:
    """What few bits cost, part by part and block by block."""
    at = f"{study['bits']} bits"
    parts, labelled = study["parts"], study["float_top1"] is not None
    what, unit = (
        ("top1", "top-1 (%)")
        if labelled
        else ("same_class", "same class as the float model (%)")
        if "same_class" in parts[EVERYTHING]
        else ("distance", "squared distance of the vectors by their variance")
    )
    bars = {
        f"it alone at {at}": {part: parts[part][what] for part in PARTS},
        f"everything but it at {at}": {part: parts[f"but {part}"][what] for part in PARTS if part != EVERYTHING},
    }
    if "trained" in study:
        bars["it alone, trained, the rest at 8 bits"] = study["trained"]
    rows = [
        [part, *(f"{by_part[part]:.2f}" if part in by_part else "–" for by_part in bars.values())] for part in PARTS
    ]
    classes = "same_class" in parts[EVERYTHING]
    factor, distance = (1000, "divergence of the outputs (nats / 1000)") if classes else (100, "squared distance (%)")
    reference = study["float_top1"] if labelled else 100.0 if what == "same_class" else None
    drawings = [
        Drawing(
            "parts",
            part_bars(bars, unit, reference, "float model"),
            f"Each part of the float model quantized to {at}, calibrated and not trained, the rest in floating point"
            f" ({study['images']} images). Patch embedding and heads keep 8 bits.",
            "Bars of the accuracy with each part of the model quantized alone, and with everything but it",
        ),
        Drawing(
            "blocks",
            heat_map(
                [[factor * value for value in row] for row in study["cells"]],
                study["kinds"],
                [str(n) for n in range(len(study["blocks"]))],
                distance,
                "block",
                dark_is_bad=False,
            ),
            f"One kind of quantizers of one block at {at}, all else in floating point: how far the outputs are from "
            f"the float model's ({study['cell_images']} images). Columns are the blocks in the order they run.",
            "Heat map of the distance of the outputs, a row per kind of quantizers, a column per block",
        ),
    ]
    return (
        "The bottleneck",
        [f"What {at} cost, part by part: of the float model, calibrated."],
        [Table(["part", *(f"{name}, {unit}" for name in bars)], rows, "The numbers of the bars.")],
        drawings,
    )


def every_quantizer(models: Mapping[str, Any]) -> Part:
    """All numbers of all quantizers."""
    tables = [
        Table(
            ["quantizer", "bits", "SNR (dB)", "clipped (%)", "unused codes", "codes", "outlier channels"],
            [
                [
                    noise["name"],
                    noise["bits"],
                    "–" if noise["snr"] is None else f"{noise['snr']:.1f}",
                    f"{100 * noise['clipped']:.2f}",
                    noise["unused"],
                    noise["codes"],
                    "–" if noise["outliers"] is None else len(noise["outliers"]),
                ]
                for noise in model["quantizers"]
            ],
            name,
        )
        for name, model in models.items()
    ]
    return "Every quantizer", [], tables, []
