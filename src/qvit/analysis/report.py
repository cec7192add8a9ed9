"""Reports: one HTML file that needs nothing else, to be read on a screen or sent to someone."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from qvit.files import printable, write_text

Cell = str | int | float
_NUMBER = re.compile(r"([–-]?|[+±−-]?\d[\d.,]*[%×]?)(\s|$)")  # nothing or a dash, too


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
    """A heading, and under it paragraphs, then tables, then figures. All text is plain text, not HTML."""

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write a report: one HTML file with its images inside, that loads nothing from anywhere.

    Raises:
        OutputError: if the file cannot be written; what was at ``path`` is still there.
    """
    text = _TEMPLATE.render(title=title, sections=sections)
    write_text(Path(path), text)


def _data_uri(image: bytes | str) -> str:
    kind, content = ("svg+xml", image.encode()) if isinstance(image, str) else ("png", image)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shown(cell: Cell) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _is_number(table: Table, column: int) -> bool:
    cells = [_shown(row[column]) for row in table.rows]
    return all(_NUMBER.match(cell) for cell in cells) and any(c.isdigit() for cell in cells for c in cell)


_environment = Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: printable(value) if isinstance(value, str) else value,
)
_environment.filters |= {"data_uri": _data_uri, "shown": _shown}
_environment.tests["number"] = _is_number
_TEMPLATE = _environment.from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1a1a1a; --page: #ffffff; --line: #d0d0d0; --soft: #595959; --head: #f3f3f3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #17191c; --line: #45484d; --soft: #b0b3b8; --head: #23262a; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 68rem; margin: 2rem auto; padding: 0 1.25rem; }
p { max-width: 44rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
figcaption { color: var(--soft); font-size: .92rem; padding-top: .5rem; max-width: 48rem; }
th, td { text-align: left; padding: .35rem .8rem; border-bottom: 1px solid var(--line); }
th { background: var(--head); vertical-align: bottom; }
td:not(.number) { min-width: 7rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
@media (max-width: 45rem) { th, td { padding: .35rem .5rem; } }
figure { margin: 1.5rem 0; }
/* Drawn on white, in dark mode too; on a narrow screen to be scrolled rather than too small to read. */
img { max-width: max(100%, 38rem); height: auto; box-sizing: border-box; padding: .5rem; background: #ffffff;
      border-radius: 4px; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<figure>
<div class="wide"><table>
<thead><tr>
{% for column in table.columns %}
<th scope="col"{% if table is number(loop.index0) %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
<td{% if table is number(loop.index0) %} class="number"{% endif %}>{{ cell | shown }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% if table.caption %}
<figcaption>{{ table.caption }}</figcaption>
{% endif %}
</figure>
{% endfor %}
{% for figure in section.figures %}
<figure>
<div class="wide"><img src="{{ figure.image | data_uri }}" alt="{{ figure.alt }}"></div>
<figcaption>{{ figure.caption }}</figcaption>
</figure>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
""")
