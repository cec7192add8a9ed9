"""What MkDocs needs beside the pages: those of the repository's root, one of the public names, links between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

import qvit

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "weakness.md",
}
"""Pages of the root by their names in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs``."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8")))
    names = [f"::: qvit.{home}.{name}" for name, home in qvit._HOMES.items()]
    functions = ["# From Python", *names, "::: qvit.config.QuantConfig", "::: qvit.hub", "::: qvit.errors"]
    files.append(File.generated(config, "api.md", content="\n\n".join(functions)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links lead to the site's pages."""
    for name, place in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}(?=[)#])", f"]({place}", markdown)
    return markdown.replace("](docs/", "](")


class PlainRoles(griffe.Extension):
    """Shows what docstrings refer to (``:func:`qvit.export```) as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", obj.docstring.value)
