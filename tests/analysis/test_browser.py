"""A report in a real browser: its tables sort, nothing is wider than a phone, and it asks nobody for anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import chromium, needs_chromium
from pages import HOSTILE
from qvit.analysis.figures import svg, training_curves
from qvit.analysis.report import Figure, Section, Table, write_report
from qvit.files import printable

pytestmark = needs_chromium
ROWS = [
    ["item 10", 2.5, "1,200", "90.1 ± 0.3"],
    ["item 9", -1.0, "–", "91.0 ± 0.2"],
    ["Item 1", 30.25, "", "9.5 ± 0.1"],
    ["item 2", 4.0, "800", "−3.0 ± 0.1"],
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of every kind of part, with hostile texts and long ones in all places."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    record = {"epoch": 1, "train_loss": 1.0, "val_top1": 50.0}
    figure = Figure(svg(training_curves({"float": [record, {**record, "epoch": 2}]})), "A figure", "two curves")
    long = "a_name_without_a_space" * 12
    texts = [*HOSTILE, long]
    write_report(
        path,
        long,
        [
            Section("Numbers", ["One"], [Table(["name", "value", "count", "top-1"], ROWS)], [figure]),
            Section(long, texts, [Table(texts, [texts, texts], long)], [figure], [figure] * 5),
        ],
    )
    return path


@pytest.fixture(scope="module")
def page(browser: Any, report: Path) -> Any:
    """The report, open in a window of phone width."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    page.goto(report.as_uri())
    return page


def column(page: Any, number: int) -> list[str]:
    cells: list[str] = page.locator("table").first.locator(f"tbody td:nth-child({number + 1})").all_inner_texts()
    return cells


@pytest.mark.parametrize(
    ("number", "upwards"),
    [
        (0, ["Item 1", "item 2", "item 9", "item 10"]),
        (1, ["-1.00", "2.50", "4.00", "30.25"]),
        (2, ["800", "1,200", "–", ""]),
        (3, ["−3.0 ± 0.1", "9.5 ± 0.1", "90.1 ± 0.3", "91.0 ± 0.2"]),
    ],
)
def test_a_heading_sorts_its_table_by_mouse_and_by_keyboard(page: Any, number: int, upwards: list[str]) -> None:
    before = column(page, number)
    heading = page.locator("table").first.locator("th").nth(number)
    button = heading.get_by_role("button")
    empty = [text for text in upwards if text in ("–", "")]
    downwards = [*[text for text in reversed(upwards) if text not in empty], *empty]
    for direction, expected in (("ascending", upwards), ("descending", downwards), ("none", before)):
        if direction == "descending":
            button.press("Enter")
        else:
            button.click()
        assert heading.get_attribute("aria-sort") == direction
        assert column(page, number) == expected
    button.click()
    other = page.locator("table").first.locator("th").nth((number + 1) % 4).get_by_role("button")
    other.click()
    assert heading.get_attribute("aria-sort") == "none"  # one column at a time
    for _ in range(2):
        other.click()
    assert column(page, number) == before


def test_nothing_is_wider_than_a_phone_and_no_request_leaves(page: Any, report: Path) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert {url for url in page.requests if not url.startswith("data:")} == {report.as_uri()}
    assert page.complaints == []
    assert page.locator("section").nth(1).locator("p").all_inner_texts()[: len(HOSTILE)] == list(
        map(printable, HOSTILE)
    )
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    # What the policy is for: even a script of the page's own is refused whatever would ask somebody.
    asked = "fetch('https://example.org/').then(() => 'answered', () => 'refused')"
    assert page.evaluate(f"() => {asked}") == "refused"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_without_scripts_a_table_is_a_table(browser: Any, report: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(report.as_uri())
    assert page.locator("button").count() == 0
    assert column(page, 0) == [str(row[0]) for row in ROWS]


@pytest.mark.parametrize(("media", "colour"), [("screen", "rgb(23, 25, 28)"), ("print", "rgb(255, 255, 255)")])
def test_in_the_dark_figures_stand_on_white_and_paper_stays_white(page: Any, media: str, colour: str) -> None:
    page.emulate_media(color_scheme="dark", media=media)
    colours = [
        page.evaluate(f"getComputedStyle(document.querySelector('{element}')).backgroundColor")
        for element in ("body", "img")
    ]
    assert colours == [colour, "rgb(255, 255, 255)"]
