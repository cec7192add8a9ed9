from __future__ import annotations

import base64
import re

import pytest

from pages import HOSTILE, Page, check_page
from qvit.analysis.figures import png, svg, training_curves
from qvit.analysis.report import Figure, Section, Table, write_report
from qvit.errors import OutputError
from qvit.files import printable


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
    page = check_page(report.read_text())
    assert page.all("h1")[0]["text"] == page.all("title")[0]["text"] == "Title <script>"
    assert [h["text"] for h in page.all("h2")] == ["Results <script>alert(1)</script>", "Empty"]
    assert [p["text"] for p in page.all("p")] == ["One paragraph.", "a < b"]
    assert [c["text"] for c in page.all("figcaption")] == ["Caption & more", "As SVG", "As PNG"]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_text_holds_it_is_shown_as_text(tmp_path, figure, text):
    path, image = tmp_path / "report.html", Figure(png(figure), text, text)
    section = Section(text, [text], [Table([text, "n"], [[text, 1], [text, 2]], text)], [image], [image])
    write_report(path, text, [section])
    page = check_page(path.read_text())
    texts = {tag: {element["text"] for element in page.all(tag)} for tag in ("title", "h1", "h2", "p", "figcaption")}
    assert texts == {tag: {printable(text)} for tag in texts}
    assert [cell["text"] for cell in page.all("td")] == [printable(text), "1", printable(text), "2"]
    assert {image["attrs"]["alt"] for image in page.all("img")} == {printable(text)}


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
        (["4.2e-05", "1e-06", "0.021"], True),
        (["–", "", "-"], False),
        (["2 bits", "float"], False),
        (["4-bit"], False),
    ],
)
def test_which_columns_are_numbers(tmp_path, cells, right):
    path = tmp_path / "report.html"
    write_report(path, "", [Section("", tables=[Table(["x"], [[cell] for cell in cells])])])
    assert {cell["attrs"].get("class") for cell in Page(path.read_text()).all("td")} == {"number" if right else None}
