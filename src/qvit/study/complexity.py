"""Tables of what models cost: counted, predicted for this machine, and measured on it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qvit.analysis.complexity import Complexity
from qvit.analysis.size import RULE
from qvit.bench.compare import compare
from qvit.bench.cost import HOW, predicted_seconds, seconds_per_mac
from qvit.bench.peers import PEERS
from qvit.bench.random_model import random_model
from qvit.config import Bits
from qvit.files import printable
from qvit.format.packed import write_packed
from qvit.format.program import Program
from qvit.runtime.environment import machine

PAPER_MODELS = {
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-S": "swin_small_patch4_window7_224",
    "Swin-B": "swin_base_patch4_window7_224",
}
"""The paper's models by the paper's names."""
CLAIM = "6.14"
"""Times fewer operations of a 4-bit ViT-S than in full precision, as the paper counts them (Q-ViT, NeurIPS 2022)."""
ROUNDS = 10
_PEER = "torch"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of one image on one thread, the fastest of :data:`ROUNDS`: in the engine, and in PyTorch if it can."""

    engine: float
    peer: float | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model costs.

    Args:
        counted: what does not depend on the machine.
        seconds_per_mac: of the engine on one thread, by the bits of both factors.
        predicted: seconds of one image in the engine on one thread, by the cost of a multiply-add of each width.
        measured: the same, measured; ``None`` unless asked for.
    """

    counted: Complexity
    seconds_per_mac: Mapping[Bits, float]
    predicted: float
    measured: Measured | None


def costs_of(
    models: Mapping[str, Complexity], *, measure: bool, report: Callable[[str], None] = lambda message: None
) -> dict[str, Cost]:
    """Return what models cost on this machine, by name.

    Args:
        models: what was counted of each, by name.
        measure: whether to time each, with random codes, beside the float model in PyTorch.
        report: told what goes on, a line each.

    Raises:
        QvitError: as :func:`qvit.bench.compare.compare`.
    """
    report(f"Timing multiply-adds: {HOW}.")
    seconds = seconds_per_mac({bits for counted in models.values() for bits in counted.operations.macs})
    costs = {}
    for name, counted in models.items():
        measured = None
        if measure:
            report(f"Timing {name} in the engine and in PyTorch.")
            measured = _measured(counted.program)
        costs[name] = Cost(counted, seconds, predicted_seconds(counted.program, seconds), measured)
    return costs


def _measured(program: Program) -> Measured:
    with tempfile.TemporaryDirectory(prefix="qvit-complexity-") as folder:
        path = Path(folder) / "random.safetensors"
        write_packed(path, random_model(program))
        comparison = compare({"qvit": path}, [1], [1], peers=[_PEER], rounds=ROUNDS)
    peer = comparison.fastest_peer(1, 1)
    return Measured(min(comparison.timings[0].seconds), None if peer is None else min(peer.seconds))


def model_tables(name: str, cost: Cost) -> list[Table | str]:
    """Return what one model costs: in short, by width, and beside the paper's claim."""
    counted, operations = cost.counted, cost.counted.operations
    size = " x ".join(map(str, counted.program.input[1:]))
    about = _table(f"{name}, images of {size}", ("", ""))
    about.add_row("parameters", f"{counted.parameters:,}")
    about.add_row("size in float32", f"{counted.float_size:,} bytes")
    times = counted.float_size / counted.file_size
    about.add_row("size of the packed file", f"{counted.file_size:,} bytes, {times:.2f} times fewer")
    about.add_row("multiply-adds of an image", f"{operations.total:,}")
    about.add_row("count as, of float32", f"{operations.float_equivalent:,.0f}")
    about.add_row("counting rule", RULE)
    about.add_row("bit operations", f"{operations.bit_operations:,}")
    about.add_row("predicted time", f"{1e3 * cost.predicted:.2f} ms per image on one thread")
    about.add_row("predicted from", HOW)
    if cost.measured is not None:
        about.add_row(
            "measured time",
            f"{1e3 * cost.measured.engine:.2f} ms, the prediction is {_error(cost.predicted, cost.measured)} off",
        )

    widths = _table("Multiply-adds of one image", ("weights or keys, values", "inputs", "number", "share", "ps each"))
    for bits, count in operations.macs.items():
        fraction, picoseconds = count / operations.total, 1e12 * cost.seconds_per_mac[bits]
        widths.add_row(str(bits.weight), str(bits.activation), f"{count:,}", f"{fraction:.1%}", f"{picoseconds:.2f}")

    claims = _table("Beside float32", ("what", "times less"))
    claims.add_row("operations, by the rule above", _times(operations.total, operations.float_equivalent))
    claims.add_row("operations of a 4-bit ViT-S, the paper's claim (Q-ViT, NeurIPS 2022)", CLAIM)
    if cost.measured is not None and cost.measured.peer is not None:
        ratio = _times(cost.measured.peer, cost.measured.engine)
        claims.add_row(f"time, measured here beside {PEERS[_PEER].title}, one image on one thread", ratio)
    return [about, widths, claims]


def models_tables(costs: Mapping[str, Cost]) -> list[Table | str]:
    """Return what several models cost, a line each: counted, and the time, each with a sentence about it."""
    widths = sorted({bits for cost in costs.values() for bits in cost.counted.operations.macs})
    headings = ["parameters\n(M)", "float32\n(MB)", "file\n(MB)"]
    headings += [f"{bits.weight}/{bits.activation}\n(G)" for bits in widths]
    counted_table = _table("Cost of one image", ["model", *headings, "float32\n(G)", "times\nfewer"])
    for name, cost in costs.items():
        counted, operations = cost.counted, cost.counted.operations
        counted_table.add_row(
            printable(name),
            f"{counted.parameters / 1e6:.2f}",
            f"{counted.float_size / 1e6:.2f}",
            f"{counted.file_size / 1e6:.2f}",
            *(f"{operations.macs.get(bits, 0) / 1e9:.3f}" for bits in widths),
            f"{operations.float_equivalent / 1e9:.3f}",
            _times(operations.total, operations.float_equivalent),
        )

    measured = all(cost.measured is not None for cost in costs.values())
    more = ["measured\n(ms)", "error of the\nprediction", "PyTorch\n(ms)", "times\nfaster"] if measured else []
    time_table = _table("Time of one image", ["model", "predicted\n(ms)", *more])
    for name, cost in costs.items():
        time_table.add_row(printable(name), f"{1e3 * cost.predicted:.2f}", *_measured_cells(cost))
    counts = (
        "4/4: 10^9 multiply-adds of 4-bit weights (or keys, values) and 4-bit inputs. float32 (G): what all of them "
        f"count as; {RULE}. The paper claims {CLAIM} times fewer for a 4-bit ViT-S (Q-ViT, NeurIPS 2022)."
    )
    beside = f" PyTorch: {PEERS[_PEER].title}, one thread; the fastest of {ROUNDS} rounds." if measured else ""
    times = f"Engine on one thread of {machine()['cpu']}. Predicted from {HOW}.{beside}"
    return [counted_table, counts, time_table, times]


def _measured_cells(cost: Cost) -> list[str]:
    if cost.measured is None:
        return []
    engine, peer = cost.measured.engine, cost.measured.peer
    beside = ["", ""] if peer is None else [f"{1e3 * peer:.1f}", _times(peer, engine)]
    return [f"{1e3 * engine:.2f}", _error(cost.predicted, cost.measured), *beside]


def _error(predicted: float, measured: Measured) -> str:
    return f"{predicted / measured.engine - 1:+.0%}"


def _times(more: float, less: float) -> str:
    return f"{more / less:.2f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=Text(printable(title)),
        title_justify="left",
        caption_justify="left",
        show_header=any(columns),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column and number else "left")
    return table
