from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from pages import HOSTILE
from qvit.analysis.figures import png, svg
from qvit.analysis.model_figures import attention_overlays, head_dots, heat_map, layer_curves, part_bars
from qvit.files import printable


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_a_model_has_the_same_colour_and_marker_in_every_panel_and_the_legend():
    panels = {"a (bits)": {"two": [1.0, 2.0]}, "b (bits)": {"one": [1, 2], "two": [3, 4]}, "c": {"two": [0, 0]}}
    figure = layer_curves(["one", "two"], panels, {"a (bits)": [4]})
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == list(panels)
    first, second, *_ = figure.axes
    lines = [(line.get_color(), line.get_marker()) for line in (first.get_lines()[0], second.get_lines()[1])]
    handle = figure.legends[0].legend_handles[1]
    assert lines == [(handle.get_color(), handle.get_marker())] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert "bound: 4 bits" in texts(figure)
    assert {axes.get_xlabel() for axes in figure.axes[:3]} == {"attention layer"}


def test_dots_are_heads_and_the_line_is_their_mean():
    figure = head_dots(["one", "two"], {"pixels": {"one": [[1, 3], [5]], "two": [[2, 2], [2]]}})
    line, dots = figure.axes[0].get_lines()[:2]
    assert line.get_ydata().tolist() == [2, 5]
    assert dots.get_ydata().tolist() == [1, 3, 5]


def test_maps_of_a_picture_share_one_scale():
    pictures = [np.full((8, 6, 3), 200, np.uint8)] * 2
    maps = {"one": [np.full((2, 3), 0.25), np.eye(2)], "two": [np.full((2, 3), 0.5), np.eye(2)]}
    figure = attention_overlays(pictures, ["cat: 1.png", "2.png"], maps)
    first, second = (figure.axes[column].get_images()[0] for column in (1, 2))
    assert first.get_clim() == second.get_clim() == (0, 50)
    assert first.get_extent() == [0, 6, 8, 0]
    assert {"picture", "one", "two", "attention (%)"} <= set(texts(figure))
    assert figure.axes[0].get_ylabel() == "cat: 1.png"


@pytest.mark.parametrize("dark_is_bad", [True, False])
def test_numbers_of_a_heat_map_can_be_read_and_the_bad_end_is_dark(dark_is_bad):
    figure = heat_map([[1.0, None], [20.0, 30.0]], ["a", "b"], ["0", "1"], "dB", "block", dark_is_bad=dark_is_bad)
    numbers = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert list(numbers) == ["1", "20", "30"]
    light = {"#FFFFFF"}
    assert {numbers["1" if dark_is_bad else "30"]} == light
    assert {numbers["30" if dark_is_bad else "1"]} != light
    assert figure.axes[0].get_xlabel() == "block"


def test_bars_stand_at_their_part_also_where_one_has_no_number():
    bars = {"alone": {"a": 10.0, "b": 20.0}, "but": {"a": 15.0}}
    figure = part_bars(bars, "top-1 (%)", 25.0, "float model")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["10.0", "15.0", "20.0"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alone", "but", "float model: 25.0"]
    assert len(figure.axes[0].patches) == 3


def test_hostile_names_are_text():
    names = list(HOSTILE)
    values = [[1.0]] * len(names)
    maps = {name: [np.eye(2)] for name in names[:4]}
    for figure in (
        heat_map(values, names, ["0"], "dB", "block"),
        attention_overlays([np.zeros((4, 4, 3), np.uint8)], [names[5]], maps),
        layer_curves([3 * name for name in names], {"a": {3 * name: [1.0, 2.0] for name in names}}, {}),
    ):
        assert "<script" not in svg(figure)
        shown = texts(figure)
        assert all(printable(line) == line for text in shown for line in text.split("\n"))
    assert any("\\u202e" in text for text in shown)
    assert Image.open(io.BytesIO(png(figure))).width > 500
