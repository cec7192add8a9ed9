"""Reports as a reader of HTML finds them: elements with their texts, and what every page must and must not have."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from qvit.files import printable

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = (
    "<script>document.title = 1</script>",
    "</style><img src=x onerror=alert(1)>",
    "\" onload='alert(1)",
    "]]>--><b>&amp;",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe",
    "😀 猫",
    "a\nb\x00\x1b[31m",
    "$x$",
)
"""What a page takes for more than text, or shows as something else, if nobody sees to it."""


class Page(HTMLParser):
    """Keeps the elements with their attributes and the text in them, and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1]["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] == tag]


def check_page(text: str) -> Page:
    """Check that a report is whole and asks nobody for anything, whatever the texts in it; return it."""
    page = Page(text)
    (policy,) = (m["attrs"]["content"] for m in page.all("meta") if m["attrs"].get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert len(page.all("script")) == len(page.all("style")) == 1
    allowed = (
        "html head meta title style body h1 section h2 p figure div table thead tr th tbody td figcaption img script"
    )
    assert {element["tag"] for element in page.elements} <= set(allowed.split())
    assert not [name for element in page.elements for name in element["attrs"] if name.startswith("on")]
    for image in page.all("img"):
        assert re.match(r"data:image/(svg\+xml|png);base64,", image["attrs"]["src"])
        assert image["attrs"]["alt"]
    shown = [element["text"] for element in page.elements if element["tag"] not in ("script", "style")]
    assert all(printable(text.replace("\n", "")) == text.replace("\n", "") for text in shown)
    return page
