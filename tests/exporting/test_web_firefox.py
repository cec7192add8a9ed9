"""The page and the module in Firefox, where there is one."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import ISOLATING, serving
from firefox import firefox, needs_firefox
from golden import GOLDEN, images_of
from node import Node, NodeEngine
from packed_models import make_packed
from qvit.exporting.web_file import web_file
from qvit.exporting.web_site import write_site
from qvit.format.packed import read_packed, write_packed
from qvit.runtime.engine import Engine

FAMILIES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
RUN = """async (url, images, threads) => {
    const { load } = await import("./qvit.js");
    const model = await load(url, { threads });
    const outputs = await model.run(Float32Array.from(images));
    model.close();
    return [model.threads, ...outputs];
}"""
IN_PAGE = "async (code) => JSON.parse(await window.eval(code))"  # what Marionette runs imports no module
READY = """async (said) => {
    const status = document.getElementById("status");
    while (!status.textContent.includes(said)) await new Promise((done) => setTimeout(done, 10));
    await navigator.serviceWorker.ready;
    return status.textContent;
}"""
CLASSIFY = """async (encoded) => {
    const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
    const chosen = new DataTransfer();
    chosen.items.add(new File([bytes], "a.png", { type: "image/png" }));
    const [file, status, table] = ["file", "status", "classes"].map((name) => document.getElementById(name));
    file.files = chosen.files;
    file.dispatchEvent(new Event("change"));
    while (!status.textContent.includes("to prepare the picture")) await new Promise((done) => setTimeout(done, 10));
    return [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
}"""


@needs_firefox
@pytest.mark.slow
def test_the_page_and_the_module_in_firefox(node: Node, tmp_path: Path) -> None:
    """The page as in Chromium, offline too; then every family's outputs as in Node, on any number of threads."""
    model, site = make_packed(4, image_size=(32, 32), patch_size=(8, 8), embed_dim=32, head_dim=16), tmp_path / "site"
    write_packed(tmp_path / "model.safetensors", model)
    write_site(tmp_path / "model.safetensors", site)
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    best = Engine(model, threads=1).predict(file.getvalue(), 5)[0]
    classes = [[name, f"{100 * probability:.1f} %"] for name, probability in best]
    for family in FAMILIES:
        (site / f"{family}.qvit").write_bytes(web_file(read_packed(GOLDEN / f"{family}.safetensors")))
    (site / "empty.html").write_text("<!doctype html>")
    with firefox() as browser:
        with serving(site) as server:
            address = f"http://127.0.0.1:{server.server_port}/"
            browser.goto(address)
            assert browser.evaluate(READY, "Ready").endswith("with one thread.")
            assert browser.evaluate(CLASSIFY, picture) == classes
        browser.goto(address)
        threads = min(4, browser.evaluate("async () => navigator.hardwareConcurrency"))
        assert (f"{threads} threads" if threads > 1 else "one thread") in browser.evaluate(READY, "Ready")
        assert browser.evaluate(CLASSIFY, picture) == classes
        with serving(site, ISOLATING) as server:
            browser.goto(f"http://127.0.0.1:{server.server_port}/empty.html")
            for family in FAMILIES:
                packed = read_packed(GOLDEN / f"{family}.safetensors")
                images = images_of(packed.program)
                expected = NodeEngine(node, packed)(images).reshape(-1).tolist()
                for threads in (1, 2, 3):
                    given = json.dumps([f"{family}.qvit", images.reshape(-1).tolist(), threads])
                    told = browser.evaluate(IN_PAGE, f"({RUN})(...{given}).then(JSON.stringify)")
                    assert told == [threads, *expected], family
