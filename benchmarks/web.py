"""Packed models in Chromium beside onnxruntime-web: what is downloaded, time to the first result, and per image.

Random weights; one thread and two; float32 and both int8 modes of ONNX Runtime's quantizer. In rounds the runtimes,
each in a page of its own, take turns: one image after a pause, then some in a row. Needs the extras bench and dev,
Chromium, Node.js, and

    npm install onnxruntime-web

Example: python benchmarks/web.py node_modules/onnxruntime-web/dist --rounds 20
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from qvit.bench.peers import PEERS, Case
from qvit.exporting.web_site import write_site
from qvit.format.packed import read_packed
from qvit.runtime.environment import machine
from random_models import write_random

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
MODES = {"onnxruntime": ".onnx", "onnxruntime-dynamic": ".dynamic.onnx", "onnxruntime-static": ".static.onnx"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IN_A_ROW = 5
"""Images of a round, after the first."""
Run = tuple[str, str, str]
"""Title, kind of runtime and address of a model."""


class _Handler(SimpleHTTPRequestHandler):
    """Hands out a folder and keeps which files were asked for."""

    asked: set[str]

    def do_GET(self) -> None:
        self.asked.add(self.path)
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # only such pages have threads
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def prepare(folder: Path, name: str, all_bits: list[int]) -> list[Run]:
    """Write the sites of a model and the ONNX files of its float model; return what there is to run."""
    runs: list[Run] = []
    for bits in all_bits:
        packed = write_random(folder / f"{name}-{bits}.safetensors", name, bits)
        write_site(packed, folder / f"{name}-{bits}")
        runs.append((f"qvit, {bits} bits", "qvit", f"{name}-{bits}/model.qvit"))
    case = Case(read_packed(folder / f"{name}-{all_bits[0]}.safetensors").program, 1, 1, folder / f"{name}.onnx")
    for mode, suffix in MODES.items():
        PEERS[mode].load(case)
        runs.append((PEERS[mode].title, "onnxruntime", case.onnx.with_suffix(suffix).name))
    return runs


def measure(
    page_of: Any, folder: Path, asked: set[str], runs: list[Run], all_threads: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Open a page for every run with every number of threads, and let them take turns."""
    results: list[dict[str, Any]] = []
    pages: list[Page] = []
    for threads, (title, kind, address) in product(all_threads, runs):
        asked.clear()
        page = page_of()
        first = page.evaluate("run => window.first(run)", [kind, address, threads])
        files = [folder / path.lstrip("/") for path in asked if not path.endswith(".html") and "favicon" not in path]
        contents = [file.read_bytes() for file in files]
        results.append(
            {
                "title": title,
                "threads": threads,
                "version": first["version"],
                "bytes": sum(map(len, contents)),
                "gzip": sum(len(gzip.compress(content)) for content in contents),
                "first": first["milliseconds"],
                "alone": [],
                "row": [],
            }
        )
        pages.append(page)
    for _ in range(rounds):
        for page, result in zip(pages, results, strict=True):
            alone, *row = page.evaluate("count => window.again(count)", IN_A_ROW)
            result["alone"].append(alone)
            result["row"] += row
    for page in pages:
        page.close()
    return results


def table(name: str, results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [
        f"| {name} | threads | download (MB) | gzip (MB) | of float32's | first result (ms) "
        "| image (ms) | times as fast | in a row (ms) | times as fast |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        peers = [
            peer for peer in results if peer["threads"] == result["threads"] and not peer["title"].startswith("qvit")
        ]
        times = []
        for kind in ("alone", "row"):
            time = statistics.median(result[kind])
            times += [f"{time:.1f}", f"{min(statistics.median(peer[kind]) for peer in peers) / time:.2f}"]
        lines.append(
            f"| {result['title']} ({result['version']}) | {result['threads']} | {result['bytes'] / 1e6:.1f} | "
            f"{result['gzip'] / 1e6:.1f} | 1/{peers[0]['bytes'] / result['bytes']:.1f} | {result['first']:.0f} | "
            f"{' | '.join(times)} |"
        )
    return lines


def main() -> None:
    """Measure, and print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnxruntime_web", type=Path, metavar="DIST", help="onnxruntime-web's folder of scripts")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where models are kept, for another run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = arguments.folder or Path(temporary)
        shutil.copytree(arguments.onnxruntime_web, folder / "ort", dirs_exist_ok=True)
        shutil.copy(Path(__file__).with_suffix(".html"), folder / "index.html")
        prepared = folder / "runs.json"
        if not prepared.exists():
            prepared.write_text(json.dumps({name: prepare(folder, name, arguments.bits) for name in arguments.models}))
        _Handler.asked = set()
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def page_of() -> Page:
            page = browser.new_context().new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            return page

        print(f"Chromium {browser.version}, {machine()['cpu']}, median of {arguments.rounds} rounds\n")
        for name, runs in json.loads(prepared.read_text()).items():
            results = measure(page_of, folder, _Handler.asked, runs, arguments.threads, arguments.rounds)
            print(*table(name, results), sep="\n", end="\n\n", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
