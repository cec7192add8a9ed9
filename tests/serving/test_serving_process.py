"""``qvit serve`` as a process: how it starts, what it refuses, and that it ends without losing a request."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commands import run, sentence
from qvit.errors import ConfigError
from qvit.runtime.engine import load
from qvit.serving import server

Server = tuple[subprocess.Popen[str], int]


@contextlib.contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    """Start ``qvit serve`` and yield its process and its port."""
    command = [sys.executable, "-m", "qvit.cli", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as served:
        try:
            assert served.stdout is not None
            said = served.stdout.readline()
            start, place, end = map(re.escape, (f"{arguments[0]}: ", " is served at http://127.0.0.1:", " (engines: "))
            found = re.fullmatch(rf"{start}\w+{place}(\d+){end}\d+, threads of each: 1\)\n", said)
            assert found, served.communicate()
            yield served, int(found[1])
        finally:
            served.kill()


class Client(http.client.HTTPConnection):
    """Sends a picture in two steps: the server has taken the request before its body comes."""

    def __init__(self, port: int, body: bytes) -> None:
        super().__init__("127.0.0.1", port)
        self._body = body
        self.putrequest("POST", "/predict")
        for name, value in (("Content-Type", "image/png"), ("Content-Length", str(len(body)))):
            self.putheader(name, value)
        self.putheader("Expect", "100-continue")
        self.endheaders()
        assert self.sock.recv(1000).startswith(b"HTTP/1.1 100 ")

    def finish(self) -> None:
        self.send(self._body)

    def answer(self) -> tuple[int, Any, str | None]:
        response = http.client.HTTPResponse(self.sock, method="POST")
        response.begin()
        return response.status, json.loads(response.read()), response.getheader("Retry-After")


def png(side: int) -> bytes:
    """Return a picture that is small to send, and larger to decode."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


def test_sigterm_ends_the_server_when_every_request_that_it_took_is_answered(packed_file: Path) -> None:
    content = png(20)
    expected = load(packed_file, threads=1).predict(content)[0]
    with serving(packed_file) as (served, port):
        clients = [Client(port, content) for _ in range(20)]
        for client in clients[:10]:
            client.finish()
        served.send_signal(signal.SIGTERM)
        for client in clients[10:]:
            client.finish()
        for client in clients:
            status, told, _ = client.answer()
            assert (status, [(entry["name"], entry["probability"]) for entry in told["classes"]]) == (200, expected)
        out, err = served.communicate()
    assert (served.returncode, out, err) == (0, "", "")


def test_a_burst_and_hostile_clients_leave_a_server_that_answers(packed_file: Path) -> None:
    with serving(packed_file, "--queue", "1", "--max-bytes", "100000") as (served, port):
        clients = [Client(port, png(1500)) for _ in range(12)]
        for client in clients:
            client.finish()
        told = [client.answer() for client in clients]
        assert {(status, later) for status, _, later in told} == {(200, None), (503, "1")}
        for content in (
            b"",
            b"\r\n\r\n",
            b"GET",
            b"POST /predict HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
            os.urandom(999),
        ):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(content)  # and goes away
        for content, status in ((b"", 422), (png(20)[:60], 422), (bytes(100_001), 413), (png(20), 200)):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/predict", content, {"Content-Type": "image/png"})
            assert connection.getresponse().status == status
            connection.close()
        clients.append(Client(port, b"never sent"))  # the server waits for it, until it is interrupted again
        served.send_signal(signal.SIGINT)
        with contextlib.suppress(ConnectionError):  # refused, or reset: it listens no longer
            while True:
                socket.create_connection(("127.0.0.1", port)).close()
        served.send_signal(signal.SIGINT)
        out, err = served.communicate()
    assert (served.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "qvit: Interrupted."


def test_a_port_that_another_program_has_is_told(packed_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = sentence(run("serve", packed_file, "--port", str(port)))
    assert said == f"qvit: Nothing can listen at 127.0.0.1, port {port}: Address already in use; give another."


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("localhost", "localhost")])
def test_the_address_can_be_opened_as_it_is_told(packed_file: Path, host: str, shown: str) -> None:
    try:
        server.listen(host, 0).close()
    except ConfigError:
        pytest.skip(f"this machine has no {host}")
    said = []

    def report(start: str) -> None:
        said.append(start)
        raise InterruptedError

    with pytest.raises(InterruptedError):  # and the engines' threads end, or the test would not
        server.serve(packed_file, host, 0, threads=1, top_k=1, waiting=1, largest_body=9, report=report)
    assert re.search(rf" is served at http://{re.escape(shown)}:\d+ \(engines: ", said[0])


def test_what_cannot_be_served_is_told(packed_file: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(packed_file.read_bytes()[:-9])
    assert "damaged.safetensors" in sentence(run("serve", tmp_path / "damaged.safetensors"))
    assert "absent.safetensors" in sentence(run("serve", tmp_path / "absent.safetensors"))
    assert "fewer than the 1000 threads" in sentence(run("serve", packed_file, "--threads", "1000"))
    assert "Nothing can listen at 256.0.0.1, port 8000: " in sentence(run("serve", packed_file, "--host", "256.0.0.1"))


def test_without_the_serving_libraries_the_extra_is_named(packed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qvit.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # not to be found
    said = sentence(run("serve", packed_file))
    assert said == "qvit: This command needs uvicorn: pip install 'qvit[serve]' brings it."


@pytest.mark.parametrize(("available", "threads", "engines"), [(8, 1, 8), (8, 3, 2), (8, 8, 1), (1, 1, 1)])
def test_engines_have_as_many_threads_as_there_are_processors_and_no_more(
    packed_file: Path, monkeypatch: pytest.MonkeyPatch, available: int, threads: int, engines: int
) -> None:
    monkeypatch.setattr(server, "processors", lambda: available)
    made = server.make_engines(packed_file, threads)
    assert [engine.threads for engine in made] == [threads] * engines
