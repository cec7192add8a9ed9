"""From a float model, pictures and a budget to a file of overrides and a report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID
from rich.table import Table

from qvit.data.pictures import open_pictures
from qvit.errors import ConfigError
from qvit.files import all_or_none, check_new, printable, write_text
from qvit.search.find import Found, Report, check_budgets, search_bits
from qvit.search.report import RULES, columns, rows, write_search_report
from qvit.study.inputs import decoded, float_model
from qvit.train.display import progress_bar
from qvit.train.options import Options, make_accelerator


@dataclasses.dataclass(frozen=True)
class Request:
    """What bits are searched for.

    Args:
        source: the float model: what :func:`qvit.models.float_models.load_float` takes.
        images: folder of pictures.
        budgets: as of :func:`qvit.search.find.search_bits`.
        model: timm's name, for a source that is a file of weights alone.
        pictures: to set the scales with, at most.
        held_out: pictures to measure distances on, at most.
        threads: of the engine that is timed; ``None`` for as many as this process may use.
        report: folder of ``report.html`` and ``report.json``; ``None`` for none.
    """

    source: str
    images: Path
    budgets: Mapping[str, float]
    model: str | None = None
    pictures: int = 512
    held_out: int = 64
    threads: int | None = None
    report: Path | None = None


def run_search(request: Request, options: Options, console: Console) -> Found:
    """Search, and write the overrides to ``options.out``, and the report; nothing is written before all is done.

    Raises:
        ConfigError: for an output that is there already, or a budget that nothing keeps.
        QvitError: as the functions that it calls.
    """
    check_budgets(request.budgets)
    if not options.out.name:
        raise ConfigError("--out is no name of a file: give one such as bits.txt.")
    page, record = ((request.report or options.out) / name for name in ("report.html", "report.json"))
    outputs = [options.out, *([page, record] if request.report is not None else [])]
    check_new(outputs)
    teacher, spec = float_model(request.source, request.model, console)
    chosen = open_pictures(
        request.images, spec.mode, count=request.pictures, held_out=request.held_out, seed=options.seed
    )
    if chosen.remark:
        console.print(printable(chosen.remark), soft_wrap=True)
    with progress_bar(console) as bar:
        used, held_out = (
            decoded(images, spec, options, bar, title)
            for images, title in ((chosen.used, "pictures"), (chosen.held_out, "pictures held out"))
        )
        used, held_out = used or held_out, held_out or used[:1]
        teacher = teacher.to(make_accelerator(options).device).requires_grad_(False)
        with _stages(bar) as report:
            found = search_bits(
                teacher, used, request.budgets, held_out=held_out, threads=request.threads, report=report
            )
    budgets = [word for name, limit in request.budgets.items() for word in (f"--budget-{name}", str(limit))]
    settings = {"--pictures": request.pictures, "--held-out": request.held_out, "--seed": options.seed}
    settings |= {} if request.threads is None else {"--threads": request.threads}
    given = [str(word) for setting in settings.items() for word in setting]
    command = shlex.join(["qvit", "search-bits", *_inputs(request), *budgets, *given])
    with all_or_none(outputs):
        if request.report is not None:
            about = {
                "command": command,
                "model": spec.name,
                "pictures": sum(map(len, used)),
                "held_out": sum(map(len, held_out)),
            }
            write_search_report(page, found, about)
            write_text(record, json.dumps({**about, "seed": options.seed, **dataclasses.asdict(found)}, indent=1))
        write_text(options.out, overrides_text(found, command))
    return found


def overrides_text(found: Found, command: str) -> str:
    """Return the lines of a file for ``--override @FILE``, after one that says where they are from."""
    lines = [f"# {printable(command)}"]
    for pattern, (weight, activation) in found.overrides.items():
        lines.append(f"{pattern}={weight}" if weight == activation else f"{pattern}={weight}/{activation}")
    return "\n".join(lines) + "\n"


def summary(found: Found, request: Request, options: Options) -> list[Table | str]:
    """Return what the command prints of a search: a table and what to do next."""
    table = Table(title="Calibrated, not trained", caption=RULES, caption_justify="left")
    for number, name in enumerate(columns(found)):
        table.add_column(name, justify="right" if number else "left")
    for row in rows([found.model, *found.uniform]):
        table.add_row(*row)
    widest = max(max(bits) for bits in found.overrides.values())
    words = ["qvit", "quantize", *_inputs(request), "--bits", str(widest), "--override", f"@{options.out}"]
    command = shlex.join([*words, "--out", "model.safetensors"])
    return [
        table,
        printable(f"{options.out} holds the bits: {command}; qvit train and qvit ablate take it likewise."),
    ]


def _inputs(request: Request) -> list[str]:
    """Return the words of a command for the model and the pictures."""
    named = [] if request.model is None else ["--model", request.model]
    return [request.source, *named, "--images", str(request.images)]


@contextmanager
def _stages(bar: Bar) -> Iterator[Report]:
    """Show what a search is at, a task for each stage, and how long every one took."""
    shown: list[tuple[str, TaskID, float]] = []

    def end() -> None:
        if shown:
            title, task, began = shown.pop()
            bar.remove_task(task)
            bar.console.print(f"{title}: {time.perf_counter() - began:.1f} s")

    def report(title: str, done: int, todo: int) -> None:
        if not shown or shown[0][0] != title:
            end()
            shown.append((title, bar.add_task(title, total=todo), time.perf_counter()))
        _, task, began = shown[0]
        rate = done / max(time.perf_counter() - began, 1e-9)
        bar.update(task, completed=done, description=f"{title}, {done} of {todo}, {rate:.1f} a second")

    try:
        yield report
    finally:
        end()
