"""The engine's speed beside PyTorch, ONNX Runtime and OpenVINO, and how its cost grows with the work.

Without --scaling: DeiT-T and DeiT-S, 224 x 224, batch 1 and 8, 2 threads, at 4 and 2 bits beside every runtime that is
installed (pip install 'qvit[train,bench]'), interleaved in one run; "share of peak" is the time that the model's
products would take in loops that touch registers only (peak.cpp), divided by the whole time. With it: the engine alone
against the batch, the number of tokens and threads. With --profile: what the engine's time goes to, with one
thread and two, one image and eight, and how far the two processors were from each other (handover.cpp). With --avx2:
the engine and those that can be held to AVX2 are. Random weights.

Examples:
  python benchmarks/engine.py --json engine.json
  python benchmarks/engine.py --avx2 --rounds 9
  python benchmarks/engine.py --scaling --json scaling.json
  python benchmarks/engine.py --profile --json profile.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import qvit
from peaks import compiled, handover, int8_seconds_at_peak, loop_speeds, seconds_at_peak
from qvit import _kernels
from qvit.bench.compare import ROUNDS, Comparison, Timing, compare
from qvit.bench.peers import PEERS
from qvit.runtime.environment import machine
from random_models import MODELS, program, write_random

BATCHES = (1, 2, 4, 8, 16, 32)
IMAGE_SIZES = (224, 384, 448)
"""197, 577 and 785 tokens."""
PEAK_ROUNDS = 3
PROFILED = ((1, 1), (2, 1), (1, 8), (2, 8))
"""Threads and images of a call."""
PROFILED_IMAGES = 160
console = Console()


def beside_peers(
    names: Sequence[str], bits: Sequence[int], peers: Sequence[str], rounds: int, instruction_set: str | None
) -> dict[str, Any]:
    """Measure and print the table for each model; return it as plain data by the model's name."""
    results = {}
    for name in names:
        comparison = _compare(name, bits, 224, (1, 8), (2,), peers, rounds, instruction_set)
        at_peak = _seconds_at_peak(name, bits, comparison, instruction_set)

        def share(timing: Timing, at_peak: dict[str, float] = at_peak) -> float | None:
            seconds = at_peak.get(timing.runtime)
            return None if seconds is None else seconds * timing.batch / timing.threads / timing.median

        console.print(comparison.table(f"{name}, {comparison.machine['cpu']}", share))
        speedups = [
            {
                "runtime": timing.runtime,
                "batch": timing.batch,
                "peer": peer.runtime,
                "times": peer.median / timing.median,
            }
            for timing in comparison.timings
            if timing.runtime in comparison.packed and (peer := comparison.fastest_peer(timing.batch, timing.threads))
        ]
        for row in speedups:
            console.print(
                f"{row['runtime']}, batch {row['batch']}: {row['times']:.2f} times as fast as {row['peer']}, "
                "the fastest of the others",
                highlight=False,
            )
        for line in comparison.notes():
            console.print(line, style="dim", markup=False, highlight=False)
        results[name] = {**comparison.to_dict(), "speedups": speedups, "seconds_at_peak": at_peak}
    return results


def _seconds_at_peak(
    name: str, bits: Sequence[int], comparison: Comparison, instruction_set: str | None
) -> dict[str, float]:
    """Return what the products of one image take on one thread at their peak, by runtime: of the engine and int8.

    Those of int8 are told for the best instruction set alone: with AVX2 each has products of its own.
    """
    speeds = _loop_speeds()
    programs = {title: program(name, b) for title, b in zip(comparison.packed, bits, strict=True)}
    isa = instruction_set or _kernels.instruction_sets()[0]
    found = {title: seconds_at_peak(of, speeds, isa) for title, of in programs.items()}
    if instruction_set is None:
        int8 = int8_seconds_at_peak(program(name), speeds)
        found |= {title: int8 for timing in comparison.timings if "int8" in (title := timing.runtime)}
    return {title: seconds for title, seconds in found.items() if seconds is not None}


def scaling(names: Sequence[str], bits: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure and print the engine's latency against batch, tokens and threads; return it as plain data."""
    results = {}
    for name in names:
        by_size = {
            size: _compare(name, bits, size, BATCHES if size == IMAGE_SIZES[0] else (1,), (1, 2), (), rounds)
            for size in IMAGE_SIZES
        }
        about = by_size[IMAGE_SIZES[0]].machine
        table = Table(title=f"{name}, {about['cpu']}", caption="relative: time an image, to batch 1 of 197 tokens")
        for column in ("engine", "threads", "tokens", "batch", "ms", "ms per image", "relative"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        rows = []
        for engine in by_size[IMAGE_SIZES[0]].packed:
            for threads in (1, 2):
                measured = [
                    (size, timing)
                    for size, comparison in by_size.items()
                    for timing in comparison.timings
                    if (timing.runtime, timing.threads) == (engine, threads)
                ]
                rows += [_row(size, timing, base=measured[0][1]) for size, timing in measured]
        for row in rows:
            times = f"{1e3 * row['median']:.2f}", f"{1e3 * row['per_image']:.2f}", f"{row['relative']:.2f}"
            table.add_row(row["engine"], *(str(row[key]) for key in ("threads", "tokens", "batch")), *times)
        console.print(table)
        results[name] = {"machine": about, "versions": by_size[IMAGE_SIZES[0]].versions, "rows": rows}
    return results


def profile(names: Sequence[str], bits: Sequence[int]) -> dict[str, Any]:
    """Measure and print what each kind of work takes of all threads' time; return the seconds of an image as data."""
    results: dict[str, Any] = {"machine": machine()}
    speeds = _loop_speeds()
    with contextlib.ExitStack() as stack:
        distance = stack.enter_context(compiled("handover"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvit-models-")))
        for name, b in itertools.product(names, bits):
            file = write_random(folder / f"{name}-{b}.safetensors", name, b, 224)
            columns, distances = {}, {}
            for threads, batch in PROFILED:
                before = handover(distance)
                columns[f"{threads} x {batch}"] = _profile(file, threads, batch)
                distances[f"{threads} x {batch}"] = (before, handover(distance))
            at_peak = seconds_at_peak(program(name, b), speeds, _kernels.instruction_sets()[0])
            title = f"{name}, {b} bits, microseconds an image, all threads, {results['machine']['cpu']}"
            console.print(_profile_table(title, columns, distances, at_peak))
            results[f"{name}, {b} bits"] = {"seconds": columns, "seconds_at_peak": at_peak, "handover": distances}
    return results


def _profile_table(
    title: str,
    columns: Mapping[str, Mapping[str, float]],
    distances: Mapping[str, tuple[float | None, float | None]],
    at_peak: float | None,
) -> Table:
    """Return the seconds of each work by column, the share of the products' peak, and how far processors were."""
    table = Table("threads x images", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for work in next(iter(columns.values())):
        table.add_row(work, *(f"{1e6 * seconds[work]:.0f}" for seconds in columns.values()))
    totals = [sum(seconds.values()) for seconds in columns.values()]
    table.add_row("together", *(f"{1e6 * total:.0f}" for total in totals))
    if at_peak is not None:
        table.add_row("products at their peak", *([f"{1e6 * at_peak:.0f}"] * len(columns)))
        table.add_row("their share", *(f"{100 * at_peak / total:.0f} %" for total in totals))
    if None not in itertools.chain(*distances.values()):
        ends = (f"{before:.0f}, {after:.0f}" for before, after in distances.values())
        table.add_row("ns to the other processor, before and after", *ends)
    return table


def _profile(file: Path, threads: int, batch: int) -> dict[str, float]:
    """Return the seconds of an image by kind of work, of all threads together."""
    engine = qvit.load(file, threads=threads)
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    seconds = engine.profile(images, repeats=PROFILED_IMAGES // batch)
    return {work: value / batch for work, value in seconds.items()}


def _loop_speeds() -> dict[str, float]:
    """Return the 10^9 multiply-adds a second of each loop, the best of some runs."""
    with compiled("peak") as loops:
        runs = [loop_speeds(loops) for _ in range(PEAK_ROUNDS)]
    return {loop: max(run[loop] for run in runs) for loop in runs[0]}


def _row(size: int, timing: Timing, base: Timing) -> dict[str, Any]:
    per_image = timing.median / timing.batch
    return {
        "engine": timing.runtime,
        "threads": timing.threads,
        "tokens": (size // 16) ** 2 + 1,
        "batch": timing.batch,
        "median": timing.median,
        "per_image": per_image,
        "relative": per_image / base.median,
        "seconds": timing.seconds,
    }


def _compare(
    name: str,
    bits: Sequence[int],
    size: int,
    batches: Sequence[int],
    threads: Sequence[int],
    peers: Sequence[str],
    rounds: int,
    instruction_set: str | None = None,
) -> Comparison:
    with tempfile.TemporaryDirectory(prefix="qvit-models-") as folder:
        models = {f"qvit, {b} bits": write_random(Path(folder) / f"{b}-bit.safetensors", name, b, size) for b in bits}
        return compare(
            models,
            batches,
            threads,
            peers=peers,
            rounds=rounds,
            instruction_set=instruction_set,
            report=lambda message: console.print(
                f"{name}, {size}: {message}", style="dim", markup=False, highlight=False
            ),
        )


def main() -> None:
    """Measure, print tables and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:2])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--scaling", action="store_true", help="the engine alone, against batch, tokens and threads")
    modes.add_argument("--profile", action="store_true", help="the engine alone: what its time goes to")
    modes.add_argument("--avx2", action="store_true", help="hold the engine and the others to AVX2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.profile:
        results = profile(arguments.models, arguments.bits)
    elif arguments.scaling:
        results = scaling(arguments.models, arguments.bits, arguments.rounds)
    else:
        held = "avx2" if arguments.avx2 else None
        results = beside_peers(arguments.models, arguments.bits, arguments.peers, arguments.rounds, held)
    if arguments.json:
        arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
