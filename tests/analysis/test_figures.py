from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.figures import (
    ablation_bars,
    block_errors,
    layer_profiles,
    png,
    query_histograms,
    svg,
    training_curves,
)
from qvit.analysis.statistics import QueryKeyStatistics, query_key_statistics
from qvit.analysis.style import new_figure
from qvit.errors import ConfigError


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def layer(index, sigma=1.0, entropy=None):
    edges = np.linspace(-3, 3, 101)
    counts = np.full(100, 10, np.int64)
    bits = None if entropy is None else 2
    return QueryKeyStatistics(index, 0.25, sigma, 0.0, 1.0, 1000, counts, edges, entropy, entropy, bits, bits)


def test_histograms_of_real_models(vit, images):
    student = quantize(vit, QuantConfig(2, 2))
    calibrate(student, [images])
    rows = {name: query_key_statistics(model, [images]) for name, model in (("float", vit), ("2 bits", student))}
    figure = query_histograms(rows, layers=[0, 1])
    assert len(figure.axes) == 4
    assert {"block 0", "block 1", "float", "2 bits"} <= set(texts(figure))
    written = "\n".join(texts(figure))
    assert written.count("μ = ") == written.count("σ = ") == 4
    for index in (0, 1):
        assert f"H = {rows['2 bits'][index].query_entropy:.2f} of 2 bits" in written
        assert figure.axes[index].get_xlim() == figure.axes[2 + index].get_xlim()
    image = Image.open(io.BytesIO(png(figure)))
    assert image.width > 1000
    assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_a_block_that_is_not_there():
    with pytest.raises(ConfigError, match="float has no block 2: its blocks are 0 to 1"):
        query_histograms({"float": [layer(0), layer(1)]}, layers=[0, 2])


def test_histogram_and_gaussian_are_densities():
    figure = query_histograms({"a": [layer(0), layer(5, sigma=0.5)]}, layers=[5])
    (axes,) = figure.axes
    (line,) = axes.get_lines()
    x, y = line.get_data()
    assert (y[:-1] * np.diff(x)).sum() == pytest.approx(1, abs=1e-3)
    assert x[y.argmax()] == pytest.approx(0.25, abs=0.02)
    assert y.max() == pytest.approx(1 / (0.5 * np.sqrt(2 * np.pi)), rel=1e-3)
    (stairs,) = axes.patches
    assert stairs.get_data().values.sum() * 0.06 == pytest.approx(1)


def test_queries_without_spread_are_drawn_without_a_gaussian():
    figure = query_histograms({"a": [layer(0, sigma=0.0)]}, layers=[0])
    assert not figure.axes[0].get_lines()
    assert png(figure)


def test_training_curves():
    record = {"train_loss": 2.0, "val_top1": 40.0}
    curves = {
        "float": [{"epoch": e, **record} for e in (1, 2, 3)],
        "4 bits": [{"epoch": 1, **record}],
        "not trained": [],
    }
    figure = training_curves(curves)
    assert len(figure.axes) == 2
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 3]
    assert {"training loss", "validation top-1 (%), axis from 35", "epoch", "float", "4 bits"} <= set(texts(figure))
    assert figure.axes[1].get_ylim()[0] == 35
    assert png(figure).startswith(b"\x89PNG")


def test_how_a_run_came_up_from_nothing_is_cut_off():
    rise = [{"epoch": e, "train_loss": 2.0, "val_top1": top1} for e, top1 in enumerate((11.0, 55.0, 72.0))]
    assert training_curves({"float": rise}).axes[1].get_ylim()[0] == 50


def test_ablation_bars_show_mean_and_standard_deviation():
    records = [
        {"bits": bits, "method": method, "seed": seed, "top1": top1 + seed}
        for bits, method, top1 in ((4, "baseline", 90.0), (4, "Q-ViT", 92.0), (2, "Q-ViT", 84.0))
        for seed in (0, 1, 2)
    ] + [{"bits": 2, "method": "baseline", "seed": 0, "top1": 83.0}]
    figure = ablation_bars(records)
    (axes,) = figure.axes
    tops = sorted(round(bar.get_y() + bar.get_height(), 6) for bar in axes.patches)
    assert tops == [83.0, 85.0, 91.0, 93.0]
    assert {"91.0", "93.0", "85.0", "83.0", "4 bits", "2 bits", "baseline", "Q-ViT"} <= set(texts(figure))
    assert len(axes.containers) == 4 + 3  # a single run has no spread
    assert "axis from 80" in axes.get_ylabel()
    assert axes.get_ylim()[0] == 80


def test_ablation_bars_name_a_method_by_its_title():
    figure = ablation_bars([{"bits": 2, "row": "q-vit-head", "title": "Q-ViT, head", "seed": 0, "top1": 3.0}])
    assert "Q-ViT, head" in texts(figure)
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylabel() == "top-1 (%)"


def test_svg_is_an_element_and_the_same_each_time():
    first, second = (svg(query_histograms({"a": [layer(0, entropy=1.5)]}, [0])) for _ in range(2))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")


def test_block_errors_are_bars_of_percentages_beside_one_another() -> None:
    errors = {"calibrated": {"blocks.0": 0.25, "blocks.1": 0.5}, "reconstructed": {"blocks.0": 0.125, "blocks.1": 0.4}}
    (axes,) = block_errors(errors).axes
    assert [bar.get_height() for bar in axes.patches] == [25.0, 50.0, 12.5, 40.0]
    assert len({round(bar.get_x(), 6) for bar in axes.patches}) == 4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["blocks.0", "blocks.1"]
    assert "$" not in "".join(label.get_text() for label in axes.get_yticklabels())
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(errors)


def test_layers_are_told_apart_without_colour_and_axes_show_no_markup() -> None:
    gradients = {"labels": 0.3, "guided": 0.004, "cosine": 0.1}
    record = {"query_entropy": 1.5, "attention_distance": 0.2, "query_bits": 2, "gradients": gradients}
    figure = layer_profiles({f"model {n}": [record, record] for n in range(5)})
    png(figure)  # ticks have no texts before
    assert not [text for text in texts(figure) if "$" in text]
    assert {"0.01", "0.1"} <= set(texts(figure))
    assert len({line.get_marker() for line in figure.axes[0].get_lines()}) == 5


def test_a_logarithmic_axis_of_any_figure_shows_numbers() -> None:
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.loglog([1e-3, 1e2], [2, 7])
    png(figure)
    assert {"0.001", "0.1", "10"} <= set(texts(figure))
    assert not [text for text in texts(figure) if "$" in text]
    assert [text for label in axes.get_yticklabels(minor=True) if (text := label.get_text())]  # less than a decade
