"""The paper's table: every method at every number of bits, over several seeds, with the same start and budget.

Each cell is a run in a folder of its own, ``OUT/<bits>-bit/<row>/seed-<n>``, finished when its ``result.json`` is
there; a run that was cut off goes on from its last checkpoint, and several processes may fill one folder with different
rows or seeds. Tables are made from the files.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from qvit.analysis.statistics import attention_distance, query_key_statistics
from qvit.config import Rectify
from qvit.errors import CheckpointError, ConfigError
from qvit.files import write_text
from qvit.train.data import ImageSets, make_loader, make_transform, readable
from qvit.train.loop import Options, make_accelerator
from qvit.train.methods import METHODS, FloatModel, Result, train_quantized
from qvit.train.recipe import Recipe
from qvit.train.run import can_go_on

ANALYSED_IMAGES = 512
"""Validation images for entropy and attention distance; accuracy is over all of them."""


class Row(NamedTuple):
    """A row of the table: a method, and for those with IRM which reading of it."""

    method: str
    rectify: Rectify | None

    @property
    def name(self) -> str:
        """The row's name, and its folder's: ``q-vit-head``."""
        return self.method if self.rectify is None else f"{self.method}-{self.rectify}"

    @property
    def title(self) -> str:
        """The row's name for people."""
        return METHODS[self.method].title + ("" if self.rectify is None else f", {self.rectify}")


ROWS = [
    Row(name, reading)
    for name, method in METHODS.items()
    for reading in (("head", "token") if method.rectify else (None,))
]


def rows_named(names: str | None) -> list[Row]:
    """Return the rows of a comma-separated list of their names; all of them for ``None``.

    Raises:
        ConfigError: for an unknown name, listing the known ones, or no name at all.
    """
    if names is None:
        return ROWS
    known = {row.name: row for row in ROWS}
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"There is no row {name!r}: the rows are {', '.join(known)}.")
    if not chosen:
        raise ConfigError(f"--rows names no row: the rows are {', '.join(known)}.")
    return [known[name] for name in chosen]


def ablate(
    teacher: FloatModel,
    data: ImageSets,
    recipe: Recipe,
    options: Options,
    console: Console,
    *,
    bits: Sequence[int],
    seeds: Sequence[int],
    rows: Sequence[Row] = tuple(ROWS),
) -> list[dict[str, Any]]:
    """Fill every missing cell and return all records found in the folder (see :func:`read_results`).

    Args:
        teacher: float model; teacher and start of every run.
        data: training and validation images.
        recipe: one budget for all.
        options: ``out`` is the folder of the whole table; ``seed`` is replaced by each of ``seeds``.
        console: where progress is shown.
        bits: of weights and activations.
        seeds: of calibration, order and augmentation.
        rows: which methods.

    Raises:
        CheckpointError: if the folder holds results of another recipe or teacher.
    """
    cells = [(b, row, seed) for seed in seeds for b in bits for row in rows]
    accelerator = make_accelerator(options)
    if accelerator.is_main_process:
        _check_same_experiment(options.out, recipe, teacher)
    accelerator.wait_for_everyone()
    for number, (b, row, seed) in enumerate(cells, 1):
        folder = options.out / f"{b}-bit" / row.name / f"seed-{seed}"
        result_file = folder / "result.json"
        if result_file.exists():
            continue
        console.print(f"[{number}/{len(cells)}] {b} bits, {row.title}, seed {seed}", highlight=False, markup=False)
        run = dataclasses.replace(options, out=folder, seed=seed, resume=can_go_on(folder))
        result = train_quantized(
            teacher, teacher, row.method, (b, b), row.rectify or "head", data, recipe, run, console
        )
        record = {"bits": b, "row": row.name, "title": row.title, "seed": seed}
        record |= {"top1": result.accuracy.top1, "top5": result.accuracy.top5, "images": result.accuracy.images}
        record |= _analyse(teacher, result, data, run)
        if accelerator.is_main_process:
            write_text(result_file, json.dumps(record, indent=1) + "\n")
    accelerator.wait_for_everyone()  # until the last result is written
    return read_results(options.out)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all finished cells, ordered by bits (falling), row and seed.

    A record has bits, row, title, seed, top1 and top5 (percent), images, query_entropy and key_entropy (bits, mean over
    layers and heads) and attention_distance (mean over layers and heads).

    Raises:
        CheckpointError: naming a file that cannot be read.
    """
    order = {row.name: index for index, row in enumerate(ROWS)}
    records = []
    for path in folder.glob("*-bit/*/seed-*/result.json"):
        try:
            record = json.loads(path.read_text())
            records.append((-record["bits"], order[record["row"]], record["seed"], record))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: remove it, and that cell is made again.") from error
    return [record for *_, record in sorted(records, key=lambda r: r[:3])]


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record a (bits, row): seeds, mean and standard deviation of top-1, and the gain over the baseline.

    The gain is the mean of the differences to the baseline of the same seed, with their standard deviation, where both
    were run (``None`` otherwise).
    """
    cells: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["bits"], record["row"]), {})[record["seed"]] = record
    summary = []
    for (bits, row), by_seed in cells.items():
        base = cells.get((bits, "baseline"), {})
        gains = [record["top1"] - base[seed]["top1"] for seed, record in by_seed.items() if seed in base]
        compared = gains if row not in ("baseline", "ptq") else []
        runs = list(by_seed.values())
        top1 = [run["top1"] for run in runs]
        summary.append(
            {
                "bits": bits,
                "row": row,
                "title": runs[0]["title"],
                "seeds": len(runs),
                "top1": statistics.fmean(top1),
                "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
                "gain": statistics.fmean(compared) if compared else None,
                "gain_std": statistics.stdev(compared) if len(compared) > 1 else None,
                "query_entropy": statistics.fmean(run["query_entropy"] for run in runs),
                "attention_distance": statistics.fmean(run["attention_distance"] for run in runs),
            }
        )
    return summary


def results_table(records: Sequence[dict[str, Any]], teacher_top1: float | None) -> Table:
    """Return the ablation as a table for the terminal."""
    title = "Ablation" if teacher_top1 is None else f"Ablation (full precision: {teacher_top1:.2f})"
    table = Table(title=title)
    for column in ("bits", "method", "seeds", "top-1", "gain over baseline", "query entropy", "attention distance"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in summarise(records):
        table.add_row(
            str(row["bits"]),
            row["title"],
            str(row["seeds"]),
            _mean_and_spread(row["top1"], row["top1_std"]),
            "" if row["gain"] is None else _mean_and_spread(row["gain"], row["gain_std"], "+"),
            f"{row['query_entropy']:.2f}",
            f"{row['attention_distance']:.3f}",
        )
    return table


def _mean_and_spread(mean: float, std: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" + ("" if std is None else f" ± {std:.2f}")


def _analyse(teacher: FloatModel, result: Result, data: ImageSets, options: Options) -> dict[str, float]:
    device = make_accelerator(options).device
    loader = make_loader(data.val, make_transform(result.card.preprocessing), 128, shuffle=True)
    batches, count = [], 0
    for batch in readable(loader, skip_corrupt=options.skip_corrupt):
        batches.append(batch.images.to(device))
        count += len(batch.labels)
        if count >= ANALYSED_IMAGES:
            break
    teacher.model.to(device)
    layers = query_key_statistics(result.model, batches)
    distance = attention_distance(teacher.model, result.model, batches)
    return {
        "query_entropy": statistics.fmean(layer.query_entropy or 0.0 for layer in layers),
        "key_entropy": statistics.fmean(layer.key_entropy or 0.0 for layer in layers),
        "attention_distance": float(distance.mean()),
    }


def _check_same_experiment(folder: Path, recipe: Recipe, teacher: FloatModel) -> None:
    """Keep recipe and teacher beside the results, and refuse to mix them with those of another."""
    card = dataclasses.asdict(teacher.card)
    del card["recipe"]  # its weights count, not how they came about
    experiment = json.loads(json.dumps({"recipe": recipe.to_dict(), "teacher": card}))
    path = folder / "experiment.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: give another --out.") from error
        if found != experiment:
            raise CheckpointError(f"{folder} holds results of another recipe or teacher: give another --out.")
        return
    write_text(path, json.dumps(experiment, indent=1) + "\n")
