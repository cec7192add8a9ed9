"""What this machine can do.

The speed of register-only loops (peak.cpp), that of a whole model's products at it, and how long a line of memory takes
from one processor to another (handover.cpp).

Example: python benchmarks/peaks.py
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from qvit import _kernels
from qvit.format.program import Program

LOOPS = {
    ("avx512-vnni-vbmi", "vnni"): "vpdpbusd-512",
    ("avx512-vnni-vbmi", "vnni-4"): "vpdpbusd-512",
    ("avx512-vnni-vbmi", "lookup"): "vpermb-512",
    ("avx512vl-vnni", "vnni"): "vpdpbusd-256",
    ("avx512vl-vnni", "lookup"): "vpshufb-256",
    ("avx512vl-vnni", "lookup-4"): "vpshufb-4-256",
    ("avx-vnni", "vnni"): "vpdpbusd-256",
    ("avx-vnni", "lookup"): "vpshufb-256",
    ("avx-vnni", "lookup-4"): "vpshufb-4-256",
    ("avx2", "lookup"): "vpshufb-256",
    ("avx2", "lookup-4"): "vpshufb-4-256",
    ("avx2", "maddubs-4"): "vpmaddubsw-256",
    ("avx2", "maddubs-6"): "vpmaddubsw-256",
    ("avx2", "maddubs-8"): "vpmaddubsw-256",
    ("avx2", "madd"): "vpmaddwd-256",
}
"""The loop of each product of an instruction set."""


@contextlib.contextmanager
def compiled(name: str) -> Iterator[Path]:
    """Compile a program of this folder (``peak`` or ``handover``) with ``c++`` and give its path."""
    with tempfile.TemporaryDirectory(prefix="qvit-peak-") as folder:
        program = Path(folder) / name
        source = Path(__file__).with_name(f"{name}.cpp")
        subprocess.run(["c++", "-std=c++17", "-O2", "-pthread", str(source), "-o", str(program)], check=True)
        yield program


def loop_speeds(program: Path) -> dict[str, float]:
    """Run the compiled ``peak`` and return the 10^9 multiply-adds a second of each loop, on one thread."""
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {loop: float(speed) for loop, speed in (line.split() for line in lines)}


def handover(program: Path) -> float | None:
    """Run the compiled ``handover`` and return the nanoseconds; ``None`` where it finds no two processors."""
    line = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return float(line) if line else None


def seconds_at_peak(program: Program, speeds: Mapping[str, float], isa: str) -> float | None:
    """Return what the products of one image take on one thread at the speed of their loops.

    Args:
        program: of the model; every product counts, also the few in the last block that the engine leaves out.
        speeds: of :func:`loop_speeds`.
        isa: instruction set whose products are taken; ``None`` is returned if one of them has no loop.
    """
    seconds = 0.0
    for bits, macs in program.macs().items():
        product = next(
            name for name, (left, right) in _kernels.products(isa) if bits.activation <= left and bits.weight <= right
        )
        if (isa, product) not in LOOPS:
            return None
        seconds += 1e-9 * macs / speeds[LOOPS[isa, product]]
    return seconds


def int8_seconds_at_peak(program: Program, speeds: Mapping[str, float]) -> float:
    """Return the same for products of 8 bits by the fastest loop that this processor has for them."""
    loop = next(name for name in ("vpdpbusd-512", "vpdpbusd-256", "vpmaddwd-256") if name in speeds)
    return 1e-9 * sum(program.macs().values()) / speeds[loop]


def main() -> None:
    """Print the speed of every loop, and how far two processors are from each other."""
    with compiled("peak") as program:
        for loop, speed in loop_speeds(program).items():
            print(f"{loop}: {speed:.0f}")
    with compiled("handover") as program:
        print(f"from one processor to another, ns: {handover(program)}")


if __name__ == "__main__":
    main()
