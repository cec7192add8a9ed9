"""The matrix kernels alone, on one thread, beside register-only loops of the same instructions.

The loops (peak.cpp, compiled here with c++) and the kernels take turns, and each figure is the median over the rounds.
The share that counts is the kernel's of its own loop, which is what this processor could do if sums never left the
registers and codes cost nothing to load. Kernels whose loop peak.cpp does not have are shown without a share.

Example: python benchmarks/kernels.py --json kernels.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from peaks import LOOPS, compiled, loop_speeds
from qvit import _kernels
from qvit.runtime.environment import machine

SHAPES = ((197, 576, 192), (197, 768, 192), (197, 1152, 384), (197, 1536, 384), (197, 384, 1536))
"""M x N x K of DeiT-T's and DeiT-S's layers: rows, channels, length of the dot product."""
REPEATS = 20


def main() -> None:
    """Measure, print a table and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kernels = [(isa, product, bits) for isa in _kernels.instruction_sets() for product, bits in _kernels.products(isa)]
    cases = [(*kernel, shape) for kernel in kernels for shape in SHAPES]
    speeds: dict[Any, list[float]] = {case: [] for case in cases}
    loops: dict[str, list[float]] = {}
    operands = {case: _operands(*case) for case in cases}
    with compiled("peak") as program:
        for _ in range(arguments.rounds):
            for loop, speed in loop_speeds(program).items():
                loops.setdefault(loop, []).append(speed)
            for case, (matrix, left, sums) in operands.items():
                m, n, k = case[3]
                speeds[case].append(1e-9 * m * n * k / matrix.multiply(left, sums, REPEATS))

    results: list[dict[str, Any]] = []
    for isa, product, bits, shape in cases:
        reached = statistics.median(speeds[isa, product, bits, shape])
        its_loop = LOOPS.get((isa, product), "")
        peak = statistics.median(loops[its_loop]) if its_loop in loops else None
        results.append(
            {
                "isa": isa,
                "product": product,
                "activation_bits": bits[0],
                "weight_bits": bits[1],
                "shape": " x ".join(map(str, shape)),
                "speed": reached,
                "loop": its_loop,
                "peak": peak,
                "share": None if peak is None else reached / peak,
            }
        )
    about = machine()
    table = Table(title=f"Products of codes, one thread, {about['cpu']}, median of {arguments.rounds} rounds")
    for column in (
        "instructions",
        "kernel",
        "bits (activations, weights)",
        "M x N x K",
        "10^9 multiply-adds/s",
        "loop",
        "loop's",
        "share",
    ):
        table.add_column(column, justify="left" if column in ("instructions", "kernel", "loop") else "right")
    for r in results:
        limit = ("", "") if r["peak"] is None else (f"{r['peak']:.0f}", f"{100 * r['share']:.0f} %")
        table.add_row(
            r["isa"],
            r["product"],
            f"{r['activation_bits']}, {r['weight_bits']}",
            r["shape"],
            f"{r['speed']:.0f}",
            r["loop"],
            *limit,
        )

    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "results": results}))


def _operands(
    isa: str, product: str, bits: tuple[int, int], shape: tuple[int, int, int]
) -> tuple[_kernels.Matrix, NDArray[np.uint8], NDArray[np.int32]]:
    rng, (m, n, k), (left_bits, right_bits) = np.random.default_rng(0), shape, bits
    codes = rng.integers(-(2 ** (right_bits - 1)), 2 ** (right_bits - 1), (n, k), dtype=np.int8)
    left = rng.integers(0, 2**left_bits, (m, k), dtype=np.int64).astype(np.uint8)
    return _kernels.Matrix(isa, product, codes), left, np.empty((m, n), np.int32)


if __name__ == "__main__":
    main()
