"""An engine and other processes on the same processors: what each of them keeps of what it does alone.

A neighbour hashes bytes on one thread. Engines compute one image after another, or one at a time with pauses, as small
requests come. All of a row run together for some seconds; rows take turns, and the printed figures are medians. A row
of as many threads as processors should leave everybody his own speed, and one with more threads its fair part of it.

Example: python benchmarks/neighbours.py model.safetensors --seconds 2 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from qvit.runtime.environment import machine
from qvit.runtime.processors import processors
from workers import Worker

WORK = """
import hashlib, sys, time
model, threads, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if threads:
    import numpy, qvit
    engine = qvit.load(model, threads=threads)
    images = numpy.zeros((1, *engine.program.input), numpy.float32)
    work = lambda: engine(images)
else:
    block = bytes(2**18)
    work = lambda: hashlib.sha256(block).digest()
work()
print("ready", flush=True)
for line in sys.stdin:
    times, start, spent = [], time.perf_counter(), time.process_time()
    while (began := time.perf_counter()) - start < float(line):
        work()
        times.append(time.perf_counter() - began)
        if pause:
            time.sleep(pause)
    taken, spent = time.perf_counter() - start, time.process_time() - spent
    times.sort()
    print(len(times) / taken, spent / len(times), times[len(times) // 2], times[len(times) * 99 // 100], flush=True)
"""


@dataclass(frozen=True)
class Kind:
    """A kind of process: an engine of so many threads, or, with none, a neighbour."""

    threads: int
    pause: float = 0
    """Seconds between two calls."""

    def __str__(self) -> str:
        """Return how the tables call it."""
        pauses = f", {1e3 * self.pause:.0f} ms between images" if self.pause else ""
        return f"engine of {self.threads}{pauses}" if self.threads else "neighbour"


class Speed(NamedTuple):
    """What a process reached."""

    rate: float
    """Images, or blocks of bytes, a second."""
    processor: float
    """Seconds of all processors for one of them."""
    median: float
    """Seconds from the beginning to the end of one."""
    slow: float
    """Seconds that 99 of 100 do not exceed."""


def rows(count: int) -> list[tuple[Kind, ...]]:
    """Return the processes that run together: everyone alone first, then with others; ``count`` processors."""
    whole, single, neighbour = Kind(count), Kind(1), Kind(0)
    requests, rare = Kind(count, 0.005), Kind(count, 0.05)
    return [
        (whole,),
        (single,),
        (requests,),
        (rare,),
        (neighbour,),
        (single, *[neighbour] * (count - 1)),
        (whole, neighbour),
        (whole, *[neighbour] * count),
        (requests, *[neighbour] * count),
        (whole, whole),
    ]


def main() -> None:
    """Measure every row in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a packed file, as benchmarks/random_models.py writes one")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = rows(processors())
    found: list[list[list[Speed]]] = [[[] for _ in row] for row in table]
    with contextlib.ExitStack() as stack:
        pools: dict[Kind, list[Worker]] = {}
        for kind in {kind for row in table for kind in row}:
            number = max(row.count(kind) for row in table)
            command = [sys.executable, "-c", WORK, options.model, str(kind.threads), str(kind.pause)]
            pools[kind] = [Worker(command) for _ in range(number)]
            for process in pools[kind]:
                stack.callback(process.close)
        for _ in range(options.rounds):
            for row, results in zip(table, found, strict=True):
                members = [pools[kind][row[:place].count(kind)] for place, kind in enumerate(row)]
                for process in members:
                    process.tell(str(options.seconds))
                for process, speeds in zip(members, results, strict=True):
                    speeds.append(Speed(*map(float, process.answer().split())))
    medians = [[Speed(*map(statistics.median, zip(*speeds, strict=True))) for speeds in results] for results in found]
    alone = {row[0]: speeds[0] for row, speeds in zip(table, medians, strict=True) if len(row) == 1}
    shown = Table(title=f"{machine()['cpu']}, {processors()} processors, median of {options.rounds} rounds")
    for column in ("together", "process", "a second", "of alone", "processor ms for one", "median ms", "99 % (ms)"):
        shown.add_column(column, justify="left" if column in ("together", "process") else "right")
    for row, speeds in zip(table, medians, strict=True):
        for place, (kind, speed) in enumerate(zip(row, speeds, strict=True)):
            shown.add_row(
                str(len(row)) if place == 0 else "",
                str(kind),
                f"{speed.rate:.1f}",
                f"{speed.rate / alone[kind].rate:.0%}",
                *(f"{1e3 * seconds:.2f}" for seconds in speed[1:]),
            )
    Console().print(shown)


if __name__ == "__main__":
    main()
