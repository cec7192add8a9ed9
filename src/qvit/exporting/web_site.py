"""A folder that any web server can hand out: a packed model, ``qvit.js`` that runs it, and a page (docs/web.md).

No PyTorch here.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib import resources
from pathlib import Path

from qvit.errors import ConfigError, OutputError
from qvit.exporting.web_file import web_file
from qvit.files import check_absent, first_line, make_folder
from qvit.format.packed import Source, read_packed

MODEL = "model.qvit"
MODULES = tuple(f"{vectors}{threads}.wasm" for vectors in ("simd128", "relaxed-simd") for threads in ("", "-threads"))


def write_site(source: Source, folder: str | Path) -> None:
    """Write ``folder``, a site with the model, which works offline from the second visit on.

    Args:
        source: of the packed model, as :func:`qvit.format.packed.read_packed` takes it.
        folder: must not be there.

    Raises:
        PackedFileError: if the packed model cannot be read.
        ConfigError: if the folder is there already, the kernels lack an operation, or their modules are not built.
        OutputError: if the folder cannot be written.
    """
    folder = Path(folder)
    check_absent(folder)
    files = {**_static_files(), MODEL: web_file(read_packed(source))}
    files.update(_keeping(files))
    make_folder(folder.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            site = Path(made) / folder.name
            site.mkdir()
            for name, data in files.items():
                (site / name).write_bytes(data)
            site.rename(folder)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {first_line(error)}") from error


def _static_files() -> dict[str, bytes]:
    """Return the files that all sites have, by name."""
    files = {file.name: file.read_bytes() for file in (resources.files("qvit") / "web").iterdir() if file.is_file()}
    if not files.keys() >= set(MODULES):
        raise ConfigError(
            "The engine of the browser is not built: run make web where qvit's source is, or install a wheel of qvit."
        )
    return files


def _keeping(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the scripts that keep a site on a device; their version is one of all the files."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name} {len(data)} ".encode() + data)
    # Several sites may have one origin, whose caches they share.
    names = 'const SITE = `qvit ${new URL("./", location.href)} `;\n'
    names += f"const CACHE = `${{SITE}}{digest.hexdigest()[:16]}`;\n"
    unkept = (*MODULES, "sw.js", "package.json", "qvit.d.ts")  # which modules a browser has use for, sw.js is told
    kept = ["./", *sorted(name for name in files if name not in unkept), "site.js"]
    worker = f"const FILES = {json.dumps(kept)};\n{names}{files['sw.js'].decode()}"
    return {"sw.js": worker.encode(), "site.js": f"{names}export {{ CACHE }};\n".encode()}
