"""``qvit serve`` beside its engine: pictures a second, latency, memory after 20,000 requests with hostile ones.

A DeiT with random weights, small JPEG files, and wrk as the client on the same machine. The engine alone computes
batches of prepared pictures with a thread per processor; with decoding, an engine per processor takes the files' bytes.
Engine and server take turns; pictures a second of one processor's time suffer less from other programs. Then one
request in a hundred is hostile, while other clients send a byte now and then.

Example: python benchmarks/serving.py --json serving.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from qvit.runtime.engine import Engine, load
from qvit.runtime.preprocess import preprocess_batch
from qvit.runtime.processors import processors
from random_models import MODELS, write_random

BATCH = 16
"""Pictures of a call to the engine alone."""
HOSTILE_EVERY = 100
SLOW_CLIENTS = 20
LARGEST_BODY = 16 * 2**20
SCRIPT = Path(__file__).with_suffix(".lua")


class Spent(NamedTuple):
    """What pictures took."""

    pictures: float
    seconds: float
    cpu: float
    """Seconds of all processors together."""

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Pictures a second of one processor that has nothing else to do."""
        return self.pictures / self.cpu


def write_pictures(folder: Path, count: int, side: int) -> list[Path]:
    """Write smooth JPEG files and return their paths."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        paths.append(folder / f"{number}.jpg")
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=85)
    return paths


def write_hostile(folder: Path, picture: bytes) -> list[Path]:
    """Write what no server wants to get and return the paths."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    bomb = bytearray(file.getvalue())
    bomb[16:24] = bytes([0, 16, 0, 0]) * 2  # 2^20 x 2^20 pixels
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    large = io.BytesIO()
    Image.new("RGB", (12_000, 12_000)).save(large, "PNG")  # too many pixels, and few bytes
    bodies = {
        "cut": picture[: len(picture) // 2],
        "bomb": bytes(bomb),
        "large": large.getvalue(),
        "empty": b"",
        "text": b"not an image",
        "over": bytes(LARGEST_BODY + 1),
    }
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    return [folder / name for name in bodies]


@contextlib.contextmanager
def serving(model: Path) -> Iterator[tuple[psutil.Popen, int]]:
    """Serve a model and yield the process and its port; it has to end with status 0."""
    command = [sys.executable, "-m", "qvit.cli", "serve", str(model), "--port", "0", "--max-bytes", str(LARGEST_BODY)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+:(\d+)", process.stdout.readline())
        assert found, "the server has not started"
        yield process, int(found[1])
    finally:
        process.terminate()
        status = process.wait()
    assert status == 0, f"the server has ended with status {status}"


def ask(port: int, seconds: float, connections: int, pictures: list[Path], hostile: list[Path]) -> dict[str, float]:
    """Let wrk send pictures for some seconds, and hostile bodies between them if there are any."""
    every = HOSTILE_EVERY if hostile else 0
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds:.0f}s", "--timeout=60s"]
    command += [f"--script={SCRIPT}", f"http://127.0.0.1:{port}/predict", "--", str(every), str(len(pictures))]
    before = psutil.Process().cpu_times()
    done = subprocess.run([*command, *map(str, [*pictures, *hostile])], capture_output=True, text=True, check=True)
    after = psutil.Process().cpu_times()
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {**figures, "cpu": spent}


def computed(calls: Sequence[Callable[[], int]], seconds: float) -> Spent:
    """Make calls side by side, each again and again; they return how many pictures they have computed."""
    counts = [0] * len(calls)

    def work(number: int) -> None:
        while time.perf_counter() < start + seconds:
            counts[number] += calls[number]()

    for call in calls:
        call()
    workers = [threading.Thread(target=work, args=[number]) for number in range(len(calls))]
    start, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return Spent(sum(counts), time.perf_counter() - start, time.process_time() - cpu)


def engine_alone(model: Path, pictures: list[Path], seconds: float) -> tuple[Spent, Spent]:
    """Return what the engine alone needs: for prepared pictures, and with decoding."""
    contents = [path.read_bytes() for path in pictures[:BATCH]]

    def decode(engine: Engine) -> int:
        return len(engine.predict(contents))

    engine = load(model)
    prepared = preprocess_batch(contents, engine.preprocessing)
    singles = [load(model, threads=1) for _ in range(processors())]
    alone = computed([lambda: len(engine(prepared))], seconds)
    return alone, computed([functools.partial(decode, single) for single in singles], seconds)


def cpu_times(process: psutil.Popen) -> tuple[float, float]:
    """Return the CPU seconds of a server's main thread, which speaks HTTP, and of all of its threads."""
    times = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    return times[process.pid], sum(times.values())


def slow_client(port: int, end: threading.Event) -> None:
    """Send a request byte by byte, and again when the server has had enough."""
    while not end.is_set():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            while not end.wait(0.5):
                connection.sendall(b"x")


def endure(model: Path, pictures: list[Path], hostile: list[Path], requests: int, connections: int) -> dict[str, Any]:
    """Return what some thousand requests with hostile ones come to, and the server's memory before and after."""
    end = threading.Event()
    with serving(model) as (process, port):
        warm = ask(port, 10, connections, pictures, hostile)
        clients = [threading.Thread(target=slow_client, args=(port, end)) for _ in range(SLOW_CLIENTS)]
        for client in clients:
            client.start()
        figures: dict[str, Any] = {"requests": 0, "refused": 0, "broken": 0, "p99": 0.0, "mib": []}
        while figures["requests"] < requests:
            figures["mib"].append(process.memory_info().rss / 2**20)
            part = ask(port, 1.02 * requests / 4 * warm["seconds"] / warm["requests"], connections, pictures, hostile)
            for name in ("requests", "refused", "broken"):
                figures[name] += part[name]
            figures["p99"] = max(figures["p99"], part["p99"])
        figures["mib"].append(process.memory_info().rss / 2**20)
        end.set()
        for client in clients:
            client.join()
    return figures


def main() -> None:
    """Measure, print and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture's side")
    parser.add_argument("--connections", type=int, default=32, help="of wrk")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of engine and server; the median counts")
    parser.add_argument("--requests", type=int, default=20_000, help="with hostile ones among them; 0 for none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_random(folder / "model.safetensors", arguments.model, arguments.bits)
        pictures = write_pictures(folder, BATCH, arguments.side)
        hostile = write_hostile(folder, pictures[0].read_bytes())
        spent: dict[str, list[Spent]] = {"engine": [], "engine, decoding": [], "server": []}
        turns, http, client = [], [], []
        for _ in range(arguments.rounds):
            alone, decoding = engine_alone(model, pictures, arguments.seconds / 2)
            spent["engine"].append(alone)
            spent["engine, decoding"].append(decoding)
            with serving(model) as (process, port):
                ask(port, 1, arguments.connections, pictures, [])
                before = cpu_times(process)
                turn = ask(port, arguments.seconds, arguments.connections, pictures, [])
                after = cpu_times(process)
            turns.append(turn)
            spent["server"].append(Spent(turn["requests"], turn["seconds"], after[1] - before[1]))
            http.append(1e3 * (after[0] - before[0]) / turn["requests"])
            client.append(1e3 * turn["cpu"] / turn["requests"])
        report: dict[str, Any] = {
            "rate": {what: statistics.median(turn.rate for turn in found) for what, found in spent.items()},
            "cpu_rate": {what: statistics.median(turn.cpu_rate for turn in found) for what, found in spent.items()},
            "p50": statistics.median(turn["p50"] for turn in turns),
            "p99": statistics.median(turn["p99"] for turn in turns),
            "refused": sum(turn["refused"] + turn["broken"] for turn in turns),
            "HTTP": statistics.median(http),
            "client": statistics.median(client),
        }
        if arguments.requests:
            report["hostile"] = endure(model, pictures, hostile, arguments.requests, arguments.connections)
    table = Table(title=f"{arguments.model}, {arguments.bits} bits, {arguments.side} pixels, {processors()} processors")
    shares = ("engine", "decoding")
    for column in ("", "pictures/s", *shares, "CPU", *shares):
        table.add_column(column, justify="right" if column else "left")
    for what in spent:
        cells = []
        for rates in (report["rate"], report["cpu_rate"]):
            parts = [f"{rates[what] / rates[whole]:.0%}" for whole in ("engine", "engine, decoding")]
            cells += [f"{rates[what]:.0f}", *parts]
        table.add_row(what, *cells)
    console = Console()
    console.print(table)
    console.print("CPU: pictures a second of one processor; engine and decoding: parts of what the engine gives alone.")
    console.print(
        f"Latency of {arguments.connections} clients: median {report['p50']:.1f} ms, p99 {report['p99']:.1f} ms; "
        f"{report['refused']} answers were no 200. CPU of a request: {1e3 / report['cpu_rate']['server']:.2f} ms, "
        f"of it {report['HTTP']:.2f} for HTTP, and {report['client']:.2f} of wrk."
    )
    if arguments.requests:
        told = report["hostile"]
        memory = ", ".join(f"{mib:.0f}" for mib in told["mib"])
        console.print(
            f"{told['requests']} requests, one in {HOSTILE_EVERY} hostile, beside {SLOW_CLIENTS} slow clients: "
            f"{told['refused']} refused, {told['broken']} without an answer, p99 {told['p99']:.0f} ms; "
            f"resident memory {memory} MiB."
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
