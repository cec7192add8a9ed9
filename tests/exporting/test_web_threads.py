"""Several threads in the browser and in Node: when there are any, that results do not depend on them, and their end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from browser import ISOLATING, chromium, needs_chromium, serving
from golden import GOLDEN
from node import Node, NodeError, need_modules
from packed_models import make_packed, random_packed
from programs import programs
from qvit.errors import ConfigError
from qvit.exporting.web_file import web_file
from qvit.exporting.web_site import write_site
from qvit.format.packed import read_packed
from qvit.format.program import Program
from qvit.runtime.engine import Engine

FAMILIES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
HELP = """async () => {
    const { load } = await import("./qvit.js");
    const isSame = (values, others) => values.every((value, index) => Object.is(value, others[index]));
    window.told = (work) => work().then(String, ({ name, message }) => `${name}: ${message}`);
    window.outputs = async (url, threads) => {
        const model = await load(url, { threads });
        const count = 2 * model.input.reduce((product, side) => product * side, 1);
        const values = await model.run(Float32Array.from({ length: count }, (_, index) => Math.sin(index ** 2)));
        model.close();
        return { threads: model.threads, values };
    };
    window.compared = async (url) => {
        const [first, ...others] = await Promise.all([1, 2, 3].map((threads) => outputs(url, threads)));
        return others.map(({ threads, values }) => [threads, isSame(values, first.values)]);
    };
}"""
"""Functions for the pages of these tests."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site, and a file for every family."""
    need_modules()
    folder = tmp_path_factory.mktemp("threads") / "site"
    write_site(GOLDEN / "vit.safetensors", folder)
    for family in FAMILIES:
        (folder / f"{family}.qvit").write_bytes(web_file(read_packed(GOLDEN / f"{family}.safetensors")))
    (folder / "empty.html").write_text("<!doctype html>")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def opened(browser: Any, address: str) -> Any:
    page = browser.new_page()
    page.goto(address)
    page.evaluate(HELP)
    return page


@pytest.fixture(scope="module")
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """A page that its server isolates from other origins."""
    with serving(folder, ISOLATING) as server:
        page = opened(browser, f"http://127.0.0.1:{server.server_port}/empty.html")
        yield page
        page.close()


@needs_chromium
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_a_browser(page: Any, family: str) -> None:
    assert page.evaluate("url => compared(url)", f"{family}.qvit") == [[2, True], [3, True]]


@needs_chromium
@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(program=programs(), seed=st.integers(0, 2**16))
def test_random_programs_in_a_browser(page: Any, folder: Path, program: Program, seed: int) -> None:
    packed = random_packed(program, seed)
    try:
        Engine(packed, threads=1)
    except ConfigError:
        return
    (folder / "random.qvit").write_bytes(web_file(packed))
    assert page.evaluate("url => compared(url)", "random.qvit") == [[2, True], [3, True]]


@needs_chromium
def test_a_browser_that_shares_no_memory_has_one_thread(browser: Any, page: Any, folder: Path) -> None:
    expected = page.evaluate("outputs('vit.qvit', 1).then(({ values }) => [...values])")
    threads_and_values = "outputs('vit.qvit', 3).then(({ threads, values }) => [threads, [...values]])"
    with serving(folder) as server:
        other = opened(browser, f"http://127.0.0.1:{server.server_port}/empty.html")
        assert other.evaluate(threads_and_values) == [1, expected]
        other.close()
    page.evaluate("""() => {
        window.memory = WebAssembly.Memory;
        WebAssembly.Memory = function (limits) {
            if (limits.shared) throw new RangeError("no addresses");
            return new memory(limits);
        };
    }""")
    assert page.evaluate(threads_and_values) == [1, expected]
    page.evaluate("() => { WebAssembly.Memory = memory; }")


@needs_chromium
def test_models_end_with_their_threads(page: Any) -> None:
    told = page.evaluate("""async () => {
        const { load } = await import("./qvit.js");
        const models = await Promise.all([2, 2].map((threads) => load("vit.qvit", { threads })));
        const images = new Float32Array(1000 * models[0].input.reduce((product, side) => product * side, 1));
        const runs = models.map((model) => told(() => model.run(images)));
        models[0].close();
        const after = await told(() => models[0].run(images));
        models[1].close();
        return [...await Promise.all(runs), after];
    }""")
    closed = "QvitError: The model was closed."
    assert told == [closed, closed, "QvitError: The model is closed: load it again."]


@needs_chromium
def test_threads_that_do_not_start_are_named(browser: Any, page: Any, folder: Path) -> None:
    script = folder / "thread.js"
    script.rename(folder / "thread.absent")
    other = opened(browser, page.url)
    assert other.evaluate("told(() => outputs('vit.qvit', 2))") == (
        "QvitError: The threads of the model cannot be started: load it with { threads: 1 }."
    )
    other.close()
    (folder / "thread.absent").rename(script)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process as Linux does")
def test_threads_of_node_end(node: Node) -> None:
    file = node.put("model.qvit", web_file(make_packed(4)))
    assert node.call("threads", file=file, threads=1) == 1
    assert node.call("threads", file=file, threads=3, times=5) == 3


@pytest.mark.parametrize("threads", [0, -1, 1.5, 1000, "2", True])
def test_numbers_of_threads_that_are_none(node: Node, threads: object) -> None:
    file = node.put("model.qvit", web_file(make_packed(4)))
    with pytest.raises(NodeError, match=r"threads must be a whole number from 1 to 64\."):
        node.call("threads", file=file, threads=threads)


def test_a_thread_that_fails_ends_the_call_on_all(node: Node) -> None:
    packed = make_packed(4)
    images = node.put("images", np.zeros((1, *packed.program.input), np.float32))
    with pytest.raises(NodeError, match=r"The engine cannot run tiny: one of its threads has failed\."):
        node.call("abandoned", file=node.put("model.qvit", web_file(packed)), images=images)
