from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from qvit.analysis.figures import png, svg, training_curves
from qvit.analysis.report import Figure, Section, Table, write_report
from qvit.errors import OutputError

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Keeps the elements with their attributes and the text in them, and checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1]["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


@pytest.fixture
def figure():
    return training_curves({"float": [{"epoch": e, "train_loss": 1 / e, "val_top1": 50.0 + e} for e in (1, 2)]})


@pytest.fixture
def report(tmp_path, figure):
    path = tmp_path / "new" / "report.html"
    table = Table(
        ["method", "bits", "top-1", "note"],
        [["2 bits, <b>", 2, 85.456, "4-bit"], ["float", "–", "90.1 ± 0.3", "2-bit"]],
        "Caption & more",
    )
    section = Section(
        "Results <script>alert(1)</script>",
        ["One paragraph.", "a < b"],
        [table],
        [Figure(svg(figure), "As SVG", 'a "quoted" image'), Figure(png(figure), "As PNG", "the same")],
    )
    write_report(path, "Title <script>", [section, Section("Empty")])
    return path


def test_text_is_escaped(report):
    page = Page(report.read_text())
    assert not page.all("script")
    assert not page.all("b")
    assert page.all("h1")[0]["text"] == page.all("title")[0]["text"] == "Title <script>"
    assert [h["text"] for h in page.all("h2")] == ["Results <script>alert(1)</script>", "Empty"]
    assert [p["text"] for p in page.all("p")] == ["One paragraph.", "a < b"]
    assert [c["text"] for c in page.all("figcaption")] == ["Caption & more", "As SVG", "As PNG"]


def test_report_is_self_contained(report):
    text = report.read_text()
    assert not re.search(r"https?://|@import|url\(|<link", text)
    images = Page(text).all("img")
    assert [image["attrs"]["alt"] for image in images] == ['a "quoted" image', "the same"]
    kinds = []
    for image in images:
        kind, content = re.fullmatch(r"data:image/(svg\+xml|png);base64,(.*)", image["attrs"]["src"]).groups()
        kinds.append((kind, base64.b64decode(content)[:4]))
    assert kinds == [("svg+xml", b"<svg"), ("png", b"\x89PNG")]


def test_numbers_are_aligned_to_the_right(report):
    page = Page(report.read_text())
    cells = [(cell["text"], cell["attrs"].get("class")) for cell in page.all("td")]
    assert cells == [
        ("2 bits, <b>", None), ("2", "number"), ("85.46", "number"), ("4-bit", None),
        ("float", None), ("–", "number"), ("90.1 ± 0.3", "number"), ("2-bit", None),
    ]  # fmt: skip
    assert [cell["attrs"].get("class") for cell in page.all("th")] == [None, "number", "number", None]


def test_report_is_replaced_whole(report, tmp_path):
    write_report(report, "Second", [])
    assert Page(report.read_text()).all("h1")[0]["text"] == "Second"
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]
    blocked = tmp_path / "folder"
    (blocked / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match="folder"):
        write_report(blocked, "Third", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["1.91 of 2", ""], True),
        (["32 (float)", 4], True),
        (["+0.31 ± 0.20", "−1.20"], True),
        (["6.14×", "12%"], True),
        (["–", "", "-"], False),
        (["2 bits", "float"], False),
        (["4-bit"], False),
    ],
)
def test_which_columns_are_numbers(tmp_path, cells, right):
    path = tmp_path / "report.html"
    write_report(path, "", [Section("", tables=[Table(["x"], [[cell] for cell in cells])])])
    assert {cell["attrs"].get("class") for cell in Page(path.read_text()).all("td")} == {"number" if right else None}
