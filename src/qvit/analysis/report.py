"""Reports: one HTML file that needs nothing else, to be read on a screen or sent to someone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from qvit.files import printable, write_text

Cell = str | int | float
_NUMBER = re.compile(r"([–-]?|[+±−-]?\d[\d.,]*(e-?\d+)?[%×]?)(\s|$)")  # nothing or a dash, too


@dataclass(frozen=True)
class Table:
    """A table; a column whose cells all start with a number (or are empty, or a dash) is aligned to the right.

    Attributes:
        columns: headings.
        rows: cells; a float is shown with two decimals, anything else as it is.
        caption: what the table says.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """An image.

    Attributes:
        image: a PNG file's bytes or an SVG element, as :mod:`qvit.analysis.figures` makes them.
        caption: what the image shows, under it.
        alt: the same for those who do not see the image.
    """

    image: bytes | str
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A heading, and under it paragraphs, then tables, then figures. All text is plain text, not HTML.

    ``thumbnails`` are figures too, small ones side by side at the end.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    thumbnails: Sequence[Figure] = ()


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write a report: one HTML file with its images inside, that loads nothing from anywhere.

    Raises:
        OutputError: if the file cannot be written; what was at ``path`` is still there.
    """
    page = _environment.get_template("page.html")
    write_text(Path(path), page.render(title=title, sections=sections, policy=_POLICY))


def _data_uri(image: bytes | str) -> str:
    kind, content = ("svg+xml", image.encode()) if isinstance(image, str) else ("png", image)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shown(cell: Cell) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _is_number(table: Table, column: int) -> bool:
    cells = [_shown(row[column]) for row in table.rows]
    return all(_NUMBER.match(cell) for cell in cells) and any(c.isdigit() for cell in cells for c in cell)


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "page"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: printable(value) if isinstance(value, str) else value,
)
_environment.filters |= {"data_uri": _data_uri, "shown": _shown}
_environment.tests["number"] = _is_number


def _source_of(name: str) -> str:
    """Return what a content security policy calls the style or the script of this name, which stands in the page."""
    text = _environment.get_template(name).render()
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_POLICY = (
    f"default-src 'none'; img-src data:; style-src {_source_of('page.css')}; script-src {_source_of('page.js')}; "
    "base-uri 'none'; form-action 'none'"
)
"""What a browser lets the page do: show what is in it, run its one script, and ask nobody for anything."""
