"""The server's process: engines for the processors there are, a port, and an end that loses no request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from qvit.config import check_count
from qvit.errors import ConfigError
from qvit.format.packed import read_packed
from qvit.runtime.engine import Engine
from qvit.runtime.processors import processors
from qvit.serving.app import make_app
from qvit.serving.batches import Batcher


def serve(
    model: Path,
    host: str,
    port: int,
    *,
    threads: int,
    top_k: int,
    waiting: int,
    largest_body: int,
    report: Callable[[str], None],
) -> None:
    """Serve a packed model until SIGTERM or Ctrl-C; every request that has come by then is answered.

    Args:
        model: the packed file.
        host: name or address to listen at.
        port: to listen at; 0 for any that is free.
        threads: of each engine; there are as many engines as the processors have room for.
        top_k: classes of a picture.
        waiting: pictures that may wait, see :class:`qvit.serving.batches.Batcher`.
        largest_body: bytes of a request's body.
        report: told what is served, where and with what, as soon as the server listens.

    Raises:
        PackedFileError: if the model cannot be read.
        ConfigError: for more threads than processors, or a port that cannot be had.
    """
    engines = make_engines(model, threads)
    batcher = Batcher(engines, top_k=top_k, waiting=waiting)
    app = make_app(batcher, largest_body=largest_body)
    config = uvicorn.Config(app, lifespan="off", log_level="error", access_log=False)
    with listen(host, port) as listener, batcher:
        where = f"[{host}]" if listener.family == socket.AF_INET6 and ":" in host else host
        address = f"http://{where}:{listener.getsockname()[1]}"
        report(f"{batcher.program.name} is served at {address} (engines: {len(engines)}, threads of each: {threads})")
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a client's mistake is told to the client alone
        logging.getLogger("uvicorn.error").addFilter(_is_a_fault)
        # uvicorn answers what it has taken, then raises the signal again.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvicorn.Server(config).run(sockets=[listener])


def _is_a_fault(record: logging.LogRecord) -> bool:
    """Return whether a record tells more than that a second Ctrl-C ended the request."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def make_engines(model: Path, threads: int) -> list[Engine]:
    """Return engines of ``threads`` each, so many that all of their threads together are at most the processors.

    Raises:
        PackedFileError: if the model cannot be read.
        ConfigError: for more threads than processors.
    """
    check_count("threads", threads)
    available = processors()
    if threads > available:
        raise ConfigError(f"There are {available} processors here, fewer than the {threads} threads of --threads.")
    packed = read_packed(model)
    return [Engine(packed, threads=threads) for _ in range(available // threads)]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: if it cannot, as where another program has the port.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise ConfigError(f"Nothing can listen at {host}, port {port}: {reason}; give another.") from error
    # Accepted connections inherit it. asyncio sets it only where it has opened the socket, and without it an answer's
    # second part waits 40 ms for the client to confirm the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
