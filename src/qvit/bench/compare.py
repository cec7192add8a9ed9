"""Speed of packed models beside other runtimes, all in one run.

Every runtime lives in a process of its own, so that no thread pool disturbs another, and rests while another is timed.
A round gives each its turn: one inference to wake its threads and fill the caches, one that counts. What the machine
does meanwhile then meets all of them alike, and the median of the rounds is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qvit._version import __version__
from qvit.bench.peers import HOLDS, PEERS, Case, Images, Runner
from qvit.config import check_count
from qvit.errors import ConfigError, QvitError
from qvit.files import first_line
from qvit.format.packed import read_packed
from qvit.runtime.engine import load
from qvit.runtime.environment import machine

if TYPE_CHECKING:
    from rich.table import Table

ROUNDS = 20
PAUSE = 0.1
"""Seconds between turns: idle threads look for work for some milliseconds more, ONNX Runtime's for 35."""
_CONTEXT: multiprocessing.context.BaseContext = multiprocessing.get_context("spawn")
_T = TypeVar("_T")
_Key = TypeVar("_Key")
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One runtime at one batch size and number of threads: seconds an inference, a round each."""

    runtime: str
    batch: int
    threads: int
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds an inference."""
        return statistics.median(self.seconds)


@dataclasses.dataclass
class Comparison:
    """What :func:`compare` measured.

    Args:
        packed: names of the packed models among the runtimes, the first being what the others are compared with.
        timings: runtime by runtime for each batch and number of threads.
        versions: of what each runtime is made of.
        skipped: runtimes that could not be measured, and why.
        machine: CPU and what matters of the system.
    """

    packed: list[str]
    timings: list[Timing]
    versions: dict[str, str]
    skipped: dict[str, str]
    machine: dict[str, str]

    def ratio(self, timing: Timing) -> float:
        """Return how many times as long ``timing`` took as the first packed model on the same work."""
        same = next(t for t in self.timings if (t.batch, t.threads) == (timing.batch, timing.threads))
        return timing.median / same.median

    def fastest_peer(self, batch: int, threads: int) -> Timing | None:
        """Return the fastest that is no packed model; ``None`` if there was none."""
        peers = [t for t in self.timings if (t.batch, t.threads) == (batch, threads) and t.runtime not in self.packed]
        return min(peers, key=lambda timing: timing.median, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; times in seconds, every round."""
        rows = [
            {
                **dataclasses.asdict(timing),
                "median": timing.median,
                "quartiles": statistics.quantiles(timing.seconds, n=4)[::2] if len(timing.seconds) > 1 else None,
                "images_per_second": timing.batch / timing.median,
                "ratio": self.ratio(timing),
            }
            for timing in self.timings
        ]
        rest = {name: getattr(self, name) for name in ("machine", "versions", "skipped", "packed")}
        return {**rest, "pause": PAUSE, "timings": rows}

    def notes(self) -> list[str]:
        """Return what a reader of the table must know: the machine, the versions, and what is absent."""
        lines = [f"{name}: {value}" for name, value in {**self.machine, **self.versions}.items()]
        return lines + [f"{runtime} was not measured: {reason}" for runtime, reason in self.skipped.items()]

    def panels(self) -> dict[str, dict[str, float]]:
        """Return milliseconds by runtime, by case, as :func:`qvit.analysis.figures.latency_bars` draws them."""
        panels: dict[str, dict[str, float]] = {}
        for timing in self.timings:
            panel = panels.setdefault(f"batch {timing.batch}, threads {timing.threads}", {})
            panel[timing.runtime] = 1e3 * timing.median
        return panels

    def table(self, title: str, shares: Callable[[Timing], float | None] | None = None) -> Table:
        """Return the timings as a table, with a column of the share of the products' peak if ``shares`` tells it."""
        from rich.table import Table

        table = Table(title=title, caption=f"ratio: time to that of {self.packed[0]}")
        for column in ("runtime", "batch", "threads", "ms", "images/s", "ratio"):
            first = column == "runtime"
            table.add_column(column, justify="left" if first else "right", no_wrap=first)
        if shares is not None:
            table.add_column("share of peak", justify="right")
        for index, timing in enumerate(self.timings):
            last = self.timings[index + 1 : index + 2]
            table.add_row(
                timing.runtime,
                str(timing.batch),
                str(timing.threads),
                f"{1e3 * timing.median:.2f}",
                f"{timing.batch / timing.median:.1f}",
                f"{self.ratio(timing):.2f}",
                *([] if shares is None else [_percent(shares(timing))]),
                end_section=bool(last) and (last[0].batch, last[0].threads) != (timing.batch, timing.threads),
            )
        return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def compare(
    models: Mapping[str, Path],
    batches: Sequence[int],
    threads: Sequence[int],
    *,
    peers: Sequence[str] = tuple(PEERS),
    rounds: int = ROUNDS,
    instruction_set: str | None = None,
    report: Report = lambda message: None,
) -> Comparison:
    """Time packed models and other runtimes on random images.

    Args:
        models: packed files by the name under which they are shown, which differ in bits and rectifiers alone.
        batches: images an inference.
        threads: of every runtime.
        peers: names in :data:`qvit.bench.peers.PEERS`; who is not installed is skipped.
        rounds: turns of each.
        instruction_set: that all are held to; a peer that cannot be is skipped. Each uses the best one by default.
        report: told what goes on, a line each.

    Raises:
        PackedFileError: for a file that is no packed model.
        ConfigError: for an unknown peer, models that differ in more than bits, or a number below 1.
        QvitError: if a packed model cannot be run.
    """
    for name, values in (("batches", batches), ("threads", threads), ("rounds", [rounds])):
        if not values:
            raise ConfigError(f"{name} must be at least one whole number from 1 up, not none.")
        for value in values:
            check_count(name, value)
    if not models:
        raise ConfigError("There is no model to compare: give at least one packed file.")
    for name in peers:
        if name not in PEERS:
            raise ConfigError(f"There is no peer {name!r}: there are {', '.join(PEERS)}.")
    programs = {title: read_packed(path).program for title, path in models.items()}
    program = next(iter(programs.values()))
    for title, other in programs.items():
        if (other.input, other.computation()) != (program.input, program.computation()):
            raise ConfigError(f"{title} is of another architecture than {next(iter(models))}: compare like with like.")

    comparison = Comparison(list(models), [], {}, {}, machine())
    sources = {title: str(path) for title, path in models.items()}
    for name in peers:
        if instruction_set is not None and not (PEERS[name].held and instruction_set in HOLDS):
            comparison.skipped[PEERS[name].title] = f"it cannot be held to {instruction_set}."
            continue
        try:
            comparison.versions[PEERS[name].title] = PEERS[name].versions()
            sources[PEERS[name].title] = name
        except ModuleNotFoundError as missing:
            comparison.skipped[PEERS[name].title] = f"{missing}: pip install 'qvit[train,bench]' brings it."
            report(f"{PEERS[name].title} is skipped: {missing}.")
    with tempfile.TemporaryDirectory(prefix="qvit-bench-") as folder, contextlib.ExitStack() as stack:
        runtimes = {title: stack.enter_context(_Runtime(source)) for title, source in sources.items()}
        for batch in batches:
            onnx = Path(folder) / f"batch-{batch}.onnx"
            for count in threads:
                case = Case(program, batch, count, onnx, instruction_set)
                for title in list(runtimes):
                    report(f"Loading {title}: batch {batch}, threads {count}.")
                    try:
                        comparison.versions[title] = runtimes[title].load(case)
                    except _FailedError as error:
                        if title in models:
                            raise QvitError(f"{models[title]} cannot be run: {error}") from error
                        comparison.skipped[title] = str(error)
                        report(f"{title} is skipped: {error}")
                        del runtimes[title]
                report(f"Timing batch {batch}, threads {count}: {rounds} rounds.")
                comparison.timings += _rounds(runtimes, case, rounds)
    return comparison


def interleaved(timers: Mapping[_Key, Callable[[], float]], rounds: int) -> dict[_Key, list[float]]:
    """Return the seconds that each of ``timers`` has measured, one a round: all take turns, with a pause between."""
    seconds: dict[_Key, list[float]] = {key: [] for key in timers}
    for number in range(rounds):
        # In another order each round, so that nobody always follows the same neighbour.
        for key in random.Random(number).sample(list(timers), len(timers)):
            seconds[key].append(timers[key]())
            time.sleep(PAUSE)
    return seconds


def time_once(run: Runner, images: Images) -> float:
    """Return the seconds of one inference, after another one that wakes threads and fills caches."""
    run(images)
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


class _FailedError(Exception):
    """A runtime failed; the message is a sentence."""


class _Runtime:
    """One runtime in a process of its own, which does nothing unless asked.

    Args:
        source: name of a peer, or path of a packed file.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.process = ProcessPoolExecutor(1, mp_context=_CONTEXT, initializer=_be_quiet)

    def __enter__(self) -> _Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.shutdown()

    def load(self, case: Case) -> str:
        """Load the model for ``case``, warm it up, and return the versions of what runs it."""
        return self._ask(_load, self.source, case)

    def time(self) -> float:
        """Return the seconds of one inference."""
        return self._ask(_time)

    def _ask(self, function: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return self.process.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise _FailedError("its process was killed or crashed.") from None


def _rounds(runtimes: Mapping[str, _Runtime], case: Case, rounds: int) -> list[Timing]:
    seconds = interleaved({title: runtime.time for title, runtime in runtimes.items()}, rounds)
    return [Timing(title, case.batch, case.threads, times) for title, times in seconds.items()]


# What follows runs in a runtime's own process, which holds one model at a time.
_loaded: list[tuple[Runner, Images]] = []


def _be_quiet() -> None:
    """Leave the terminal to the parent: some libraries report their progress there."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.dup2(nothing, sys.stderr.fileno())


def _load(source: str, case: Case) -> str:
    _loaded.clear()
    os.environ |= {"OMP_NUM_THREADS": str(case.threads), **HOLDS.get(case.instruction_set or "", {})}
    try:
        run, versions = (
            _engine(source, case) if source not in PEERS else (PEERS[source].load(case), PEERS[source].versions())
        )
        images = case.images()
        for _ in range(3):
            run(images)
    except Exception as error:  # whatever another library raises: the others go on without it
        raise _FailedError(f"{type(error).__name__}: {first_line(error)}") from None
    _loaded.append((run, images))
    return versions


def _engine(path: str, case: Case) -> tuple[Runner, str]:
    engine = load(path, threads=case.threads, instruction_set=case.instruction_set)
    return engine, f"qvit {__version__}, {engine.instruction_set}"


def _time() -> float:
    return time_once(*_loaded[0])
