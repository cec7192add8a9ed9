"""A site with a packed model: pictures as Pillow prepares them, what is written, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import chromium, needs_chromium, serving
from commands import run
from node import Node, NodeError, need_modules
from packed_models import make_packed
from qvit.errors import ConfigError, PackedFileError
from qvit.exporting.web_file import web_file
from qvit.exporting.web_site import MODULES, write_site
from qvit.format.packed import PackedModel, write_packed
from qvit.runtime.engine import Engine
from qvit.runtime.preprocess import fit, preprocess

KERNELS = Path(__file__).parents[2] / "build" / "web" / "kernels_test-relaxed-simd.wasm"
"""Checks every product and row operation; Node 20 has no relaxed vectors."""
RUN_PROGRAM = """async (encoded) => {
    const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
    let text = "", memory = null;
    const fd_write = (file, parts, count, written) => {
        const view = new DataView(memory.buffer);
        let length = 0;
        for (let i = 0; i < count; ++i) {
            const [start, size] = [view.getUint32(parts + 8 * i, true), view.getUint32(parts + 8 * i + 4, true)];
            text += new TextDecoder().decode(new Uint8Array(memory.buffer, start, size));
            length += size;
        }
        view.setUint32(written, length, true);
        return 0;
    };
    const others = { get: (system, name) => system[name] ?? (() => 0) };
    const system = new Proxy({ fd_write, proc_exit: (status) => { throw new Error(`status ${status}`); } }, others);
    const { instance } = await WebAssembly.instantiate(bytes, { wasi_snapshot_preview1: system });
    memory = instance.exports.memory;
    try { instance.exports._start(); } catch (error) { text += error.message; }
    return text;
}"""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def picture(width: int, height: int, opaque: bool = True) -> np.ndarray:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    pixels[..., 3] |= 255 * opaque
    return pixels


def prepared(node: Node, call: str, pixels: np.ndarray, preprocessing: dict[str, Any], kind: type) -> np.ndarray:
    height, width = pixels.shape[:2]
    out, path = node.folder / "prepared", node.put("pixels", pixels)
    node.call(call, pixels=path, width=width, height=height, preprocessing=preprocessing, out=out)
    return np.fromfile(out, kind).reshape(preprocessing["input_size"])


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (200, 100), (300, 301), (16, 700), (1, 1), (5, 3)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pictures_are_prepared_as_with_pillow(node: Node, interpolation: str, size: tuple[int, int]) -> None:
    for channels, shape, crop_mode, crop_pct in (
        (3, (32, 32), "center", 0.9),
        (1, (32, 48), "center", 1.0),
        (3, (24, 32), "border", 0.875),
        (3, (32, 32), "squash", 1.0),
    ):
        preprocessing = {
            "input_size": [channels, *shape],
            "mean": [0.485, 0.456, 0.406][:channels],
            "std": [0.229, 0.224, 0.225][:channels],
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "interpolation": interpolation,
        }
        pixels = picture(*size, opaque=crop_mode == "border")
        got = prepared(node, "fit", pixels, preprocessing, np.uint8).astype(int)
        difference = np.abs(got - fit(pixels, preprocessing))
        # Where the axes shrink by different factors, Pillow's versions differ in which they resize first.
        assert difference.max() == 0 if crop_mode == "center" or size[0] == size[1] else difference.mean() < 5


def test_values_are_those_of_the_native_engine(node: Node) -> None:
    preprocessing = make_packed(4).preprocessing
    pixels = picture(19, 23)
    got = prepared(node, "preprocess", pixels, preprocessing, np.float32)
    np.testing.assert_array_equal(got, preprocess(pixels, preprocessing))


def test_classes_and_vectors_of_pixels(node: Node) -> None:
    packed, pixels = make_packed(8), picture(19, 23)
    picture_of = {"pixels": node.put("pixels", pixels), "width": 19, "height": 23}
    file = node.put("model.qvit", web_file(packed))
    got = node.call("classify", file=file, **picture_of, top=3)
    expected = Engine(packed, threads=1).predict(pixels, 3)[0]
    assert (got["name"], got["outputs"]) == ("tiny", 5)
    assert [entry["name"] for entry in got["classes"]] == [name for name, _ in expected]
    np.testing.assert_allclose([entry["probability"] for entry in got["classes"]], [p for _, p in expected], rtol=1e-4)
    with pytest.raises(NodeError, match="tiny is a classifier: export a model without its head"):
        node.call("embed", file=file, **picture_of)
    with pytest.raises(NodeError, match=r"absent\.qvit cannot be read: ENOENT"):
        node.call("classify", file=node.folder / "absent.qvit", **picture_of)
    with pytest.raises(NodeError, match="RGBA pixels: nothing else is decoded here"):
        node.call("classify", file=file, pixels=node.put("pixels", pixels), width=20, height=23)


@pytest.fixture(scope="module")
def model() -> PackedModel:
    return make_packed(4, image_size=(32, 32), patch_size=(8, 8), embed_dim=32, head_dim=16)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, model: PackedModel) -> Path:
    need_modules()
    folder = tmp_path_factory.mktemp("web") / "site"
    path = folder.with_name("model.safetensors")
    write_packed(path, model)
    assert run("web", path, "--out", folder).status == 0
    return folder


def test_a_site_is_whole_and_never_replaced(site: Path, tmp_path: Path) -> None:
    names = {path.name for path in site.iterdir()}
    listed = (site / "sw.js").read_text().splitlines()[0]
    for name in names - {*MODULES, "sw.js", "package.json", "qvit.d.ts"}:
        assert f'"{name}"' in listed
    for script in site.glob("*.js"):
        assert "http" not in script.read_text().replace("/^https?:/", "")
    packed = site.with_name("model.safetensors")
    with pytest.raises(ConfigError, match="is there already"):
        write_site(packed, site)
    with pytest.raises(PackedFileError, match="There is no file"):
        write_site(tmp_path / "absent", tmp_path / "site")
    write_site(packed, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in site.iterdir()
    }
    assert names >= {"index.html", "qvit.js", "qvit.d.ts", "model.qvit", *MODULES}


def test_modules_that_are_not_built_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_packed(path, make_packed(4))
    monkeypatch.setattr("qvit.exporting.web_site.MODULES", ("absent.wasm",))
    with pytest.raises(ConfigError, match="is not built: run make web where qvit's source is, or install a wheel"):
        write_site(path, tmp_path / "site")


@needs_chromium
def test_the_page_in_a_browser(site: Path, model: PackedModel) -> None:
    """A picture is classified as natively, on relaxed vectors, also offline; nothing else is asked of anybody.

    Several threads are there from the second visit on, though the server knows nothing of them.
    """
    file = io.BytesIO()
    Image.fromarray(picture(80, 60)[..., :3]).save(file, "PNG")
    expected = Engine(model, threads=1).predict(file.getvalue(), 5)[0]
    arguments = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with serving(site) as server, chromium(*arguments) as browser:
        address = f"http://127.0.0.1:{server.server_port}/"
        page = browser.new_page()
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def shown() -> list[list[str]]:
            page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()})
            page.locator("#status", has_text="to prepare the picture").wait_for()
            return [row.locator("td").all_inner_texts() for row in page.locator("#classes tbody tr").all()]

        page.goto(address)
        page.locator("#status", has_text=re.compile(r"Ready .* with one thread\.")).wait_for()
        classes = [[name, f"{100 * probability:.1f} %"] for name, probability in expected]
        assert [[name, share.strip()] for name, share in shown()] == classes
        page.locator("#take").click()
        page.locator("#take", has_text="Take the picture").click()
        page.locator("#take", has_text="Use the camera").wait_for()
        if KERNELS.exists():
            told = page.evaluate(RUN_PROGRAM, base64.b64encode(KERNELS.read_bytes()).decode())
            assert "relaxed-simd: checked\nportable: checked" in told
            assert ", 0 failed" in told
        page.evaluate("() => navigator.serviceWorker.ready.then(() => null)")
        server.shutdown()
        server.server_close()
        page.reload()
        threads = min(4, page.evaluate("navigator.hardwareConcurrency"))
        page.locator("#status", has_text=f"{threads} threads" if threads > 1 else "one thread").wait_for()
        assert page.evaluate("crossOriginIsolated")
        assert [[name, share.strip()] for name, share in shown()] == classes
    assert not complaints
    assert all(url.startswith((address, "blob:")) for url in requests)
    assert f"{address}relaxed-simd.wasm" in requests
    assert not any("simd128" in url for url in requests)
