"""How Chromium decodes pictures, beside Pillow, and what the difference does to a model.

The pictures are scikit-learn's two photographs in several sizes, written by Pillow. Pixels are compared as the decoders
give them, transparent ones over white, in steps of 255; then the native engine takes both. Logits differ in units of
their standard deviation over the classes. Needs the extras train and dev, and Chromium.

Example: python benchmarks/web_decoding.py --model model.safetensors
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright
from sklearn.datasets import load_sample_images

import qvit
from qvit.exporting.web_site import write_site
from qvit.runtime.preprocess import preprocess_batch
from random_models import write_random

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = ((640, 427), (500, 375), (333, 251), (427, 427), (225, 301), (64, 47))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # the camera was held upright
FORMATS: dict[str, dict[str, Any]] = {
    **{
        f"JPEG, quality {quality}, {name}": {"format": "JPEG", "quality": quality, "subsampling": subsampling}
        for quality in (50, 75, 90, 95)
        for name, subsampling in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2))
    },
    "JPEG, progressive": {"format": "JPEG", "progressive": True},
    "JPEG, turned by EXIF": {"format": "JPEG", "exif": ROTATED},
    "JPEG, grey": {"format": "JPEG"},
    "PNG": {"format": "PNG"},
    "PNG, half transparent": {"format": "PNG"},
    "WebP, quality 80": {"format": "WEBP", "quality": 80},
    "WebP, lossless": {"format": "WEBP", "lossless": True},
    "AVIF, quality 75": {"format": "AVIF"},
    "JPEG, CMYK": {"format": "JPEG"},
}
DECODE = """async (encoded) => {
    const { pixelsOf } = await import("./model.js");
    const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
    const { data, width, height } = await pixelsOf(new Blob([bytes]));
    let text = "";
    for (let start = 0; start < data.length; start += 2 ** 15)
        text += String.fromCharCode(...data.subarray(start, start + 2 ** 15));
    return [btoa(text), width, height];
}"""


def pictures(name: str) -> list[Image.Image]:
    """Return the photographs in all sizes, as the format of this name takes them."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    sized = [ImageOps.fit(photograph, size) for photograph in photographs for size in SIZES]
    if "transparent" in name:
        for picture in sized:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    mode = {"grey": "L", "CMYK": "CMYK"}.get(name.split()[-1])
    return [picture if mode is None else picture.convert(mode) for picture in sized]


def over_white(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels (height, width, 3) of a picture with an alpha channel."""
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def by_browser(page: Page, file: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a file as ``qvit.js`` decodes it."""
    encoded, *size = page.evaluate(DECODE, base64.b64encode(file).decode())
    return over_white(Image.frombytes("RGBA", size, base64.b64decode(encoded)))


def by_pillow(file: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a file as Pillow decodes it."""
    return over_white(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGBA"))


def row(page: Page, engine: qvit.Engine, name: str, options: dict[str, Any]) -> str:
    """Return a line of the table in Markdown."""
    steps, sizes, largest, shifts, changed = 0, 0, 0, [], 0
    for picture in pictures(name):
        file = io.BytesIO()
        picture.save(file, **options)
        both = [by_browser(page, file.getvalue()), by_pillow(file.getvalue())]
        difference = np.abs(both[0].astype(int) - both[1])
        steps, sizes, largest = steps + difference.sum(), sizes + difference.size, max(largest, difference.max())
        browser, pillow = engine(preprocess_batch(both, engine.preprocessing))
        shifts.append(np.abs(browser - pillow).max() / pillow.std())
        changed += browser.argmax() != pillow.argmax()
    return (
        f"| {name} | {largest} | {steps / sizes:.3f} | {np.median(shifts):.3f} | {max(shifts):.3f} | "
        f"{changed} of {len(shifts)} |"
    )


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a packed classifier; DeiT-T with random codes if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        model = arguments.model or write_random(Path(folder) / "model.safetensors", "deit_tiny_patch16_224", 4)
        write_site(model, Path(folder) / "site")
        (Path(folder) / "site" / "empty.html").write_text("<!doctype html>")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=f"{folder}/site"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/empty.html")
        engine = qvit.load(model)
        print(f"Chromium {browser.version}, {engine.program.name}\n")
        print("| file | largest difference | mean | logits: median | largest | other class |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, options in FORMATS.items():
            print(row(page, engine, name, options), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
