"""The server's answers, asked in this process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from family_programs import feature_program
from packed_models import random_packed
from qvit.errors import CorruptImageError
from qvit.runtime.engine import Engine, load
from qvit.serving import app, batches
from qvit.serving.batches import LARGEST_BATCH, Batcher, answers

JPEG, FORM = {"content-type": "image/jpeg"}, {"content-type": "multipart/form-data; boundary=b"}


def picture(seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (31, 20)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def engine(packed_file: Path) -> Engine:
    return load(packed_file, threads=1)


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with asked(engine) as client:
        yield client


@contextlib.contextmanager
def asked(engine: Engine) -> Iterator[TestClient]:
    batcher = Batcher([engine], top_k=3, waiting=64)
    with batcher, TestClient(app.make_app(batcher, largest_body=20_000), raise_server_exceptions=False) as client:
        yield client


def classes(engine: Engine, content: bytes) -> dict[str, Any]:
    return {"classes": [{"name": name, "probability": p} for name, p in engine.predict(content, top_k=3)[0]]}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_body_and_a_form_get_what_predict_says(client: TestClient, engine: Engine, kind: str) -> None:
    content = picture(kind=kind)
    sent: list[dict[str, Any]] = [
        {"content": content, "headers": {"content-type": f"image/{kind.lower()}"}},
        {"content": content, "headers": {"content-type": "Application/Octet-Stream; of=bytes"}},
        {"content": content},
        {"files": {"anything": ("cat", content)}, "data": {"note": "a field that is no file"}},
    ]
    for request in sent:
        answer = client.post("/predict", **request)
        assert (answer.status_code, answer.json()) == (200, classes(engine, content))


def test_a_feature_extractor_answers_with_its_vector() -> None:
    engine = Engine(random_packed(feature_program()), threads=1)
    content = picture()
    with asked(engine) as client:
        answer = client.post("/predict", content=content, headers=JPEG)
    assert answer.json() == {"embedding": engine.embed(content)[0].tolist()}


def test_answers_of_a_batch_are_those_of_its_pictures_alone(engine: Engine) -> None:
    contents = [picture(seed) for seed in range(5)]
    contents[1:1] = [b"none"]
    told = answers(engine, contents, 3)
    assert isinstance(told[1], CorruptImageError)
    assert [entry for entry in told if isinstance(entry, dict)] == [
        classes(engine, content) for content in contents if content != b"none"
    ]


def bomb() -> bytes:
    """Return a PNG of a few bytes that says it has 2^40 pixels."""
    content = bytearray(picture(kind="PNG"))
    content[16:24] = bytes([0, 16, 0, 0]) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def form(body: str) -> bytes:
    return body.replace("\n", "\r\n").encode()


REFUSED: dict[str, tuple[int, str, bytes, dict[str, str]]] = {
    "empty": (422, "it is empty.", b"", JPEG),
    "no image": (422, "none of the formats that Pillow decodes.", b"no image", JPEG),
    "cut": (422, "The picture cannot be read as an image", picture()[:300], JPEG),
    "bomb": (422, "pixels", bomb(), JPEG),
    "PostScript": (422, "none of the formats", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", JPEG),
    "type": (415, "not application/json.", b"{}", {"content-type": "application/json"}),
    "long type": (415, "...", b"{}", {"content-type": "x" * 5000}),
    "no boundary": (400, "boundary", b"x", {"content-type": "multipart/form-data"}),
    "no form": (400, "Invalid multipart data.", b"x", FORM),
    "no file": (
        400,
        "curl --form image=@cat.jpg",
        form('--b\nContent-Disposition: form-data; name="a"\n\nx\n--b--\n'),
        FORM,
    ),
    "no name": (400, "name", form("--b\nContent-Disposition: form-data\n\nx\n--b--\n"), FORM),
    "two files": (
        400,
        "Too many files",
        form('--b\nContent-Disposition: form-data; name="a"; filename="a"\n\nx\n' * 2 + "--b--\n"),
        FORM,
    ),
    "form cut": (
        400,
        "",
        form('--b\nContent-Disposition: form-data; name="a"; filename="a"\nContent-Ty'),
        FORM,
    ),
}


@pytest.mark.parametrize(("status", "said", "content", "headers"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_is_refused_in_a_sentence(
    client: TestClient, engine: Engine, status: int, said: str, content: bytes, headers: dict[str, str]
) -> None:
    answer = client.post("/predict", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    (sentence,) = answer.json().values()
    assert list(answer.json()) == ["error"]
    assert said in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert " at 0x" not in sentence  # an address of this process
    assert len(sentence) < 600
    assert client.post("/predict", content=picture()).json() == classes(engine, picture())


def test_a_body_that_is_too_large_is_not_read(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(1000)

    for request in (
        {"content": bytes(20_001), "headers": JPEG},
        {"content": endless(), "headers": JPEG},
        {"content": endless(), "headers": FORM},
        {"files": {"image": bytes(20_001)}},
    ):
        answer = client.post("/predict", **request)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()) == (413, {"error": "The body is larger than 20000 bytes."})
    assert client.post("/predict", content=bytes(20_000), headers=JPEG).status_code == 422


@pytest.mark.parametrize("headers", [JPEG, FORM])
def test_a_client_that_sends_nothing_is_sent_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(app, "READING_SECONDS", 0)
    served = app.make_app(Batcher([engine], top_k=1, waiting=1), largest_body=9)
    sent: list[Any] = []

    async def ask() -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }

        async def send(message: Any) -> None:
            sent.append(message)

        await served(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"]) == {"error": "The body did not come within 0 seconds."}


def test_a_full_queue_sends_the_next_one_away_and_answers_those_that_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, go_on = threading.Event(), threading.Event()

    def answers_later(*arguments: Any) -> Any:
        computing.set()
        go_on.wait()
        return answers(*arguments)

    monkeypatch.setattr(batches, "answers", answers_later)
    batcher = Batcher([engine], top_k=3, waiting=2)
    transport = httpx2.ASGITransport(app.make_app(batcher, largest_body=20_000))

    async def ask() -> list[Any]:
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:

            def post() -> asyncio.Task[Any]:
                return asyncio.create_task(client.post("/predict", content=picture()))

            requests = [post()]
            await asyncio.to_thread(computing.wait)  # the first is computed, and two may wait
            requests += [post() for _ in range(5)]
            pending = set(requests)
            while len(pending) > 3:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            assert (await client.get("/health")).status_code == 200  # whoever watches it does not end what is busy
            go_on.set()
            return await asyncio.gather(*requests)

    with batcher:
        told = asyncio.run(ask())
    assert sorted(answer.status_code for answer in told) == [200] * 3 + [503] * 3
    for answer in told:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json() == {"error": "Too many pictures wait: send this one again later."}
        else:
            assert answer.json() == classes(engine, picture())


def test_health_and_metrics_tell_what_has_been(client: TestClient) -> None:
    def count(status: int) -> float:
        lines = client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("qvit_requests_total") and f'status_code="{status}"' in line]
        return sum(float(line.split()[-1]) for line in found if 'path="/predict"' in line)

    before = count(200), count(422)
    client.post("/predict", content=picture())
    client.post("/predict", content=b"no image")
    assert (count(200), count(422)) == (before[0] + 1, before[1] + 1)
    assert 'qvit_batch_pictures_bucket{le="1.0"}' in client.get("/metrics").text
    assert client.get("/health").json() == {"model": "vit_tiny_patch16_224"}
    for path, status in (("/predict", 405), ("/", 404)):
        answer = client.get(path)
        assert answer.status_code == status
        assert answer.json() == {"error": "There is POST /predict, GET /health and GET /metrics."}
    assert client.get("/predict").headers["allow"] == "POST"


def test_every_engine_has_its_batch_and_no_batch_is_larger_than_said(
    packed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, sizes = threading.Barrier(2), []

    def answers_together(engine: Engine, pictures: list[bytes], top_k: int) -> Any:
        sizes.append(len(pictures))
        if len(sizes) <= 2:
            together.wait()  # passed by two engines that compute at once
        return answers(engine, pictures, top_k)

    monkeypatch.setattr(batches, "answers", answers_together)
    batcher = Batcher([load(packed_file, threads=1) for _ in range(2)], top_k=1, waiting=64)

    async def ask() -> None:
        await asyncio.gather(*(batcher.answer(picture()) for _ in range(30)))

    with batcher:
        asyncio.run(ask())
    assert sum(sizes) == 30
    assert max(sizes) == LARGEST_BATCH


def test_engines_that_are_free_divide_what_waits(packed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def answers_at_once(_: Engine, pictures: list[bytes], __: int) -> Any:
        sizes.append(len(pictures))
        return [{}] * len(pictures)

    monkeypatch.setattr(batches, "answers", answers_at_once)
    batcher = Batcher([load(packed_file, threads=1) for _ in range(2)], top_k=1, waiting=64)

    async def ask() -> None:
        while batcher._free < 2:
            await asyncio.sleep(0)
        with batcher._change:  # nothing is taken before all four wait
            requests = [asyncio.create_task(batcher.answer(b"")) for _ in range(4)]
            await asyncio.sleep(0)
        await asyncio.gather(*requests)

    with batcher:
        asyncio.run(ask())
    assert sizes[0] == 2


def test_a_fault_is_told_and_the_next_picture_is_answered(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(batches, "answers", fails)
        answer = client.post("/predict", content=picture())
    assert answer.status_code == 500
    assert answer.json() == {"error": "The server has failed at this request: its log says where."}
    assert client.post("/predict", content=picture()).json() == classes(engine, picture())


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_clients_that_are_gone_leave_the_others_and_a_quiet_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, go_on = threading.Event(), threading.Event()

    def answers_later(engine: Engine, pictures: list[bytes], top_k: int) -> Any:
        computing.set()
        go_on.wait()
        return answers(engine, pictures, top_k)

    monkeypatch.setattr(batches, "answers", answers_later)

    async def ask(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.answer(picture()))
        await asyncio.to_thread(computing.wait)
        requests = [first, *(asyncio.create_task(batcher.answer(picture(seed))) for seed in range(3))]
        await asyncio.sleep(0)
        first.cancel()
        requests[2].cancel()
        go_on.set()
        told = await asyncio.gather(*requests, return_exceptions=True)
        assert [told[1], told[3]] == [classes(engine, picture(0)), classes(engine, picture(2))]
        go_on.clear()
        computing.clear()
        last = asyncio.create_task(batcher.answer(picture()))
        await asyncio.to_thread(computing.wait)
        last.cancel()  # and the loop is closed before the answer comes

    with Batcher([engine], top_k=3, waiting=9) as batcher:
        asyncio.run(ask(batcher))
        go_on.set()
