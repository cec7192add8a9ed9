"""Workers of other libraries, forked with an engine that their parent has loaded and used."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qvit.runtime.engine import Engine, load

Images = NDArray[np.float32]
IMAGES = np.random.default_rng(1).standard_normal((3, 3, 16, 16)).astype(np.float32)
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
SHARED: list[Engine] = []


def predict_in_pool(_: int) -> Images:
    return SHARED[0](IMAGES)


class Predictions(torch.utils.data.Dataset):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Images:
        return self.engine(IMAGES)


def test_workers_of_multiprocessing(packed_file: Path) -> None:
    SHARED[:] = [load(packed_file, threads=2)]
    expected = SHARED[0](IMAGES)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(predict_in_pool, range(20), chunksize=1)
    assert all(np.array_equal(result, expected) for result in results)


def test_workers_of_a_data_loader(packed_file: Path) -> None:
    engine = load(packed_file, threads=2)
    expected = engine(IMAGES)
    loader = torch.utils.data.DataLoader(Predictions(engine), 1, num_workers=2, multiprocessing_context="fork")
    assert all(np.array_equal(batch[0], expected) for batch in loader)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def test_workers_of_gunicorn_with_a_preloaded_engine(packed_file: Path, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(f"""
import numpy, qvit
engine = qvit.load({str(packed_file)!r}, threads=2)
images = numpy.ones((2, 3, 16, 16), numpy.float32)
expected = engine(images)
def app(environ, start_response):
    start_response("200 OK", [])
    return [b"same" if (engine(images) == expected).all() else b"different"]
""")
    read, write = os.pipe()
    (tmp_path / "settings.py").write_text(f"import os\ndef when_ready(server):\n    os.write({write}, b'ready')\n")
    address = tmp_path / "socket"
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers=2", f"--bind=unix:{address}"]
    command += [f"--config={tmp_path / 'settings.py'}", f"--chdir={tmp_path}", "app:app"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, pass_fds=[write])
    os.close(write)
    with server, os.fdopen(read, "rb") as pipe:
        assert pipe.read(5) == b"ready"
        answers = []
        for _ in range(20):
            connection = UnixConnection(address)
            connection.request("GET", "/")
            answers.append(connection.getresponse().read())
            connection.close()
        server.terminate()
        assert server.stderr is not None
        log = server.stderr.read()
    assert answers == [b"same"] * 20
    assert server.returncode == 0
    assert not any(word in log for word in ("TIMEOUT", "SIGKILL", "Traceback")), log
