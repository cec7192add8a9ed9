"""What a container's share of the processors costs: images per second under a quota, and against that share.

A quota is set as container runtimes set it, in a control group of this process's own (root only; version 1 or 2), and
each run is a new process in it. A run takes the threads that qvit takes there, or those of ``--threads``. The rows take
turns; the last column is the rate over what the quota's share of the rate without one would be.

Example: python benchmarks/quota.py model.safetensors --seconds 4 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qvit.runtime.processors import processors

PERIOD = 100_000
"""Microseconds, as container runtimes have it."""
RUN = """
import sys, time, numpy, qvit
engine = qvit.load(sys.argv[1], threads=int(sys.argv[2]) or None)
images = numpy.zeros((int(sys.argv[4]), *engine.program.input), numpy.float32)
engine(images)
start, count = time.perf_counter(), 0
while (taken := time.perf_counter() - start) < float(sys.argv[3]):
    engine(images)
    count += len(images)
print(engine.threads, count / taken)
"""


@contextlib.contextmanager
def control_group(share: float) -> Iterator[Path]:
    """Make a group that may take ``share`` processors, 0 for as many as it likes, and much before other groups."""
    mount = Path("/sys/fs/cgroup")
    old = (mount / "cpu" / "cpu.cfs_quota_us").parent
    group = (old if old.is_dir() else mount) / f"qvit-quota-{os.getpid()}"
    group.mkdir()
    try:
        if old.is_dir():
            (group / "cpu.shares").write_text("262144")
            (group / "cpu.cfs_quota_us").write_text(str(int(share * PERIOD) or -1))
        else:
            (group / "cpu.weight").write_text("10000")
            (group / "cpu.max").write_text(f"{int(share * PERIOD) or 'max'} {PERIOD}")
        yield group
    finally:
        group.rmdir()


def measure(model: str, share: float, threads: int, seconds: float, batch: int) -> tuple[int, float]:
    """Return the number of threads and the images per second of a process under a quota."""
    with control_group(share) as group:
        command = [sys.executable, "-c", RUN, model, str(threads), str(seconds), str(batch)]
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    taken, rate = done.stdout.split()
    time.sleep(PERIOD / 1e6)
    return int(taken), float(rate)


def main() -> None:
    """Measure every quota in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a packed file, as benchmarks/random_models.py writes one")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    count = processors()
    # No quota; half of the processors, with qvit's own threads and with one for each; a share that is not whole.
    rows = [(0.0, 0), (count / 2, 0), (count / 2, count), (0.75 * count, 0)]
    found: list[list[tuple[int, float]]] = [[] for _ in rows]
    for _ in range(options.rounds):
        for row, results in zip(rows, found, strict=True):
            results.append(measure(options.model, *row, options.seconds, options.batch))
    whole = statistics.median(rate for _, rate in found[0])
    print(f"{'processors':>10} {'threads':>7} {'images/s':>8} {'of the share':>12}")
    for (share, _), results in zip(rows, found, strict=True):
        rate = statistics.median(rate for _, rate in results)
        print(
            f"{share or count:10.2f} {results[0][0]:7d} {rate:8.1f} {rate / whole / ((share or count) / count):12.0%}"
        )


if __name__ == "__main__":
    main()
