"""What the server answers: an application of Starlette, which any ASGI server runs."""

from __future__ import annotations

import queue

import anyio
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive
from starlette_exporter import PrometheusMiddleware, handle_metrics

from qvit.config import check_count
from qvit.errors import CorruptImageError
from qvit.files import cut
from qvit.serving.batches import Batcher

READING_SECONDS = 30
"""A request's body may take; a client that is slower is sent away."""
_BYTES, _FORM = "application/octet-stream", "multipart/form-data"


def make_app(batcher: Batcher, *, largest_body: int) -> Starlette:
    """Return the application: ``POST /predict``, ``GET /health`` and ``GET /metrics``.

    Args:
        batcher: what answers pictures.
        largest_body: bytes of a request's body.

    Raises:
        ConfigError: for no byte.
    """
    check_count("largest_body", largest_body)

    async def predict(request: Request) -> Response:
        limited = Request(request.scope, _limited(request, largest_body))
        return JSONResponse(await batcher.answer(await _picture(limited)))

    async def health(_: Request) -> Response:
        return JSONResponse({"model": batcher.program.name})

    return Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", handle_metrics),
        ],
        middleware=[Middleware(PrometheusMiddleware, prefix="qvit", app_name=batcher.program.name)],
        exception_handlers={
            404: _absent,
            405: _absent,
            HTTPException: _refused,
            CorruptImageError: _unreadable,
            queue.Full: _full,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


def _limited(request: Request, largest: int) -> Receive:
    """Return what receives a request's body and refuses it beyond ``largest`` bytes: at once where its length is told.

    Starlette's ``max_body_size`` does the same and answers in plain text.
    """
    received = 0

    async def receive() -> Message:
        nonlocal received
        if int(request.headers.get("content-length", 0)) <= largest:
            message = await request.receive()
            received += len(message.get("body", b""))
            if received <= largest:
                return message
        raise HTTPException(413, f"The body is larger than {largest} bytes.")

    return receive


async def _picture(request: Request) -> bytes:
    """Return the picture that a request holds.

    Raises:
        HTTPException: if it holds none, or something else, or comes too slowly.
    """
    kind = request.headers.get("content-type", _BYTES).partition(";")[0].strip().lower()
    if kind not in (_BYTES, _FORM) and not kind.startswith("image/"):
        raise HTTPException(415, f"The body is to be a picture (image/*, {_BYTES}) or {_FORM}, not {cut(kind)}.")
    try:
        with anyio.fail_after(READING_SECONDS):
            return await (_file(request) if kind == _FORM else request.body())
    except TimeoutError as error:
        raise HTTPException(408, f"The body did not come within {READING_SECONDS} seconds.") from error


async def _file(request: Request) -> bytes:
    async with request.form(max_files=1) as form:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    raise HTTPException(400, "The form holds no file: send one picture, as curl --form image=@cat.jpg does.")


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _absent(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, "There is POST /predict, GET /health and GET /metrics.", dict(error.headers or {}))


async def _unreadable(_: Request, error: Exception) -> Response:
    return _error(422, str(error))


async def _full(_: Request, error: Exception) -> Response:
    return _error(503, "Too many pictures wait: send this one again later.", {"Retry-After": "1"})


async def _gone(_: Request, error: Exception) -> Response:
    return _error(400, "The connection was closed before the body had come.")


async def _failed(_: Request, error: Exception) -> Response:
    return _error(500, "The server has failed at this request: its log says where.")
