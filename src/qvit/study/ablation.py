"""The paper's table: every method at every number of bits, over several seeds, of one model and budget.

Each cell is a run in a folder of its own, ``OUT/<bits>-bit/<row>/seed-<n>``, finished when its ``result.json`` is
there; a run that was cut off goes on from its last checkpoint, and several commands may fill one folder: each takes
cells that no other is at. Tables are made from the files.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from qvit.analysis.gradients import loss_gradients
from qvit.analysis.statistics import QueryKeyStatistics, attention_distance, query_key_statistics
from qvit.config import RectifierKind
from qvit.data.loader import readable
from qvit.data.resident import ResidentImages
from qvit.data.sources import ImageSets
from qvit.errors import CheckpointError, ConfigError
from qvit.files import check_absent, write_text
from qvit.models.checkpoint import load_checkpoint, weights_checksum
from qvit.models.spec import ModelSpec
from qvit.quantization.distill import DistillationLoss
from qvit.study.rivals import RIVALS
from qvit.train.batches import training_batches
from qvit.train.lock import LOCK, locked
from qvit.train.methods import (
    METHODS,
    FloatModel,
    Method,
    Overrides,
    Result,
    check_student,
    train_quantized,
)
from qvit.train.options import Options, make_accelerator
from qvit.train.recipe import Recipe
from qvit.train.run import can_go_on
from qvit.train.settings import differences

ANALYSED_IMAGES = 512
"""Validation images for entropy, attention distance and gradients; accuracy is over all of them."""
MEASURED = "All figures are of the last epoch's weights (last.pt; where nothing is trained, best.pt)."
_MEANS = ("query_entropy", "key_entropy", "attention_distance")


ALL: dict[str, Method] = {**METHODS, **RIVALS}


class Row(NamedTuple):
    """A row of the table: a method, and for those with IRM which reading of it."""

    method: str
    rectifier: RectifierKind | None

    @property
    def name(self) -> str:
        """The row's name, and its folder's: ``q-vit-head``."""
        return self.method if self.rectifier is None else f"{self.method}-{self.rectifier}"

    @property
    def title(self) -> str:
        """The row's name for people."""
        return ALL[self.method].title + ("" if self.rectifier is None else f", {self.rectifier}")


ROWS = [
    Row(name, reading)
    for name, method in METHODS.items()
    for reading in (("head", "token") if method.rectified else (None,))
]

"""The rows of the paper's table; those of :data:`RIVAL_ROWS` are run where they are named."""
RIVAL_ROWS = [Row(name, "token" if method.rectified else None) for name, method in RIVALS.items()]


def rows_named(names: str | None) -> list[Row]:
    """Return the rows of a comma-separated list of their names; all of them for ``None``.

    Raises:
        ConfigError: for an unknown name, listing the known ones, or no name at all.
    """
    if names is None:
        return ROWS
    known = {row.name: row for row in (*ROWS, *RIVAL_ROWS)}
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
    ladder: bool = False,
    overrides: Overrides | None = None,
) -> list[dict[str, Any]]:
    """Fill every missing cell and return all records found in the folder (see :func:`read_results`).

    Args:
        teacher: float model; teacher and initial model of every run.
        data: training and validation images.
        recipe: one budget for all.
        options: ``out`` is the folder of the whole table; ``seed`` is replaced by each of ``seeds``.
        console: where progress is shown.
        bits: of weights and activations.
        seeds: of calibration, order and augmentation.
        rows: which methods.
        ladder: whether every run but those of the first of ``bits`` starts from the finished run of the bits before it,
            of the same row and seed; otherwise all start from the teacher.
        overrides: bits of modules by name, in every run (:class:`QuantConfig`): with 8 for some of them it says what
            their few bits cost.

    Raises:
        CheckpointError: if the folder holds results of another recipe, teacher, ladder, precision and so on.
        ConfigError: if a run would be refused (:func:`qvit.train.methods.check_student`), before anything is written;
            for a ladder of rows whose students cannot be loaded.
    """
    recipe.hyperparameters("quantized")
    simulated = [row.name for row in rows if row.method in RIVALS]
    if ladder and simulated:
        raise ConfigError(
            f"--ladder starts from finished runs, which row {simulated[0]} cannot: leave out one of them."
        )
    for row in rows:
        check_student(teacher, teacher, row.method, (bits[0], bits[0]), row.rectifier or "head", overrides, ALL)
    cells = [(b, row, seed) for seed in seeds for b in bits for row in rows]
    rungs: dict[int, int] = dict(zip(bits[1:], bits[:-1], strict=True)) if ladder else {}
    accelerator = make_accelerator(options)
    if accelerator.is_main_process:
        _check_same_experiment(data, recipe, options, teacher, bits if ladder else None, overrides)
    accelerator.wait_for_everyone()
    for number, (b, row, seed) in enumerate(cells, 1):
        folder = _folder(options.out, b, row, seed)
        with locked(folder / LOCK, accelerator) as held:
            if not held or (folder / "result.json").exists():
                continue
            initial_model = teacher
            if b in rungs:
                before = _folder(options.out, rungs[b], row, seed)
                if not (before / "result.json").exists():  # another command is at it
                    continue
                initial_model = FloatModel(
                    *load_checkpoint(before / ("last.pt" if ALL[row.method].trained else "best.pt"))
                )
            console.print(f"[{number}/{len(cells)}] {b} bits, {row.title}, seed {seed}", highlight=False, markup=False)
            run = dataclasses.replace(
                options, out=folder, seed=seed, resume=row.method in METHODS and can_go_on(folder)
            )
            begin = time.monotonic()
            result = train_quantized(
                initial_model,
                teacher,
                row.method,
                (b, b),
                row.rectifier or "head",
                data,
                recipe,
                run,
                console,
                overrides,
                ALL,
            )
            record: dict[str, Any] = {"bits": b, "row": row.name, "title": row.title, "seed": seed}
            record |= {"top1": result.accuracy.top1, "top5": result.accuracy.top5, "images": result.accuracy.images}
            record |= _analyse(teacher, result, data, recipe, run)
            record |= {"history": result.history, "seconds": time.monotonic() - begin}
            record |= {"weights": weights_checksum(result.model)}
            if accelerator.is_main_process:
                write_text(folder / "result.json", json.dumps(record, indent=1) + "\n")
    accelerator.wait_for_everyone()  # until the last result is written
    return read_results(options.out)


def report_of(folder: Path) -> Path:
    """Return the report of the ablation in a folder."""
    return folder / "report.html"


def teacher_statistics(teacher: FloatModel, data: ImageSets, options: Options) -> list[QueryKeyStatistics]:
    """Return the float model's queries and keys on the images that the runs are analysed on."""
    batches = _analysed_batches(teacher.spec, data, options)
    return query_key_statistics(teacher.model.to(batches[0][0].device), batches)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all finished cells, ordered by bits (falling), row and seed.

    A record has bits, row, title, seed, top1 and top5 (percent, of the last epoch's weights), images, query_entropy and
    key_entropy (bits, mean over layers and heads), attention_distance (mean over layers and heads), layers (for each
    its :class:`QueryKeyStatistics`, attention_distance and, where the model was trained, gradients, that is
    :class:`qvit.analysis.gradients.LossGradients`), history (a record per epoch), seconds (of this process, the last if
    it was cut off) and weights (their SHA-256).

    Raises:
        CheckpointError: naming a file that cannot be read.
    """
    order = {row.name: index for index, row in enumerate((*ROWS, *RIVAL_ROWS))}
    records = []
    for path in folder.glob("*-bit/*/seed-*/result.json"):
        try:
            record = json.loads(path.read_text())
            records.append((-record["bits"], order[record["row"]], record["seed"], record))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: remove it, and that cell is made again.") from error
    return [record for *_, record in sorted(records, key=lambda r: r[:3])]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one record a (bits, row): seeds, mean and standard deviation of top-1, and the gain over the baseline.

    The gain is the mean of the differences to the row's baseline of the same seed (``gains``), where both were run
    (``None`` otherwise), and ``gain_interval`` half of its 95 % interval (Student's t); ``against`` names the baseline.
    """
    cells: dict[tuple[int, str], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["bits"], record["row"]), {})[record["seed"]] = record
    by_row = {row.name: row for row in (*ROWS, *RIVAL_ROWS)}
    summary = []
    for (bits, row), by_seed in cells.items():
        method = ALL[by_row[row].method]
        base = cells.get((bits, method.against), {})
        gains = [record["top1"] - base[seed]["top1"] for seed, record in by_seed.items() if seed in base]
        compared = gains if method.trained and row != method.against else []
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
                "gain_interval": interval_of(compared),
                "against": ALL[method.against].title,
                "gains": compared,
                "query_entropy": statistics.fmean(run["query_entropy"] for run in runs),
                "attention_distance": statistics.fmean(run["attention_distance"] for run in runs),
            }
        )
    return summary


def interval_of(differences: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of the mean of some differences."""
    count = len(differences)
    if count < 2:
        return None
    return float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def results_table(records: Sequence[Mapping[str, Any]], teacher_top1: float | None) -> Table:
    """Return the ablation as a table for the terminal."""
    title = "Ablation" if teacher_top1 is None else f"Ablation (full precision: {teacher_top1:.2f})"
    caption = f"± of top-1: deviation over the seeds; of a gain: its 95 % interval, seed by seed. {MEASURED}"
    table = Table(title=title, caption=caption)
    for column in ("bits", "method", "seeds", "top-1", "gain over its baseline", "query entropy", "attention distance"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in summarise(records):
        table.add_row(
            str(row["bits"]),
            row["title"],
            str(row["seeds"]),
            mean_and_spread(row["top1"], row["top1_std"]),
            "" if row["gain"] is None else mean_and_spread(row["gain"], row["gain_interval"], "+"),
            f"{row['query_entropy']:.2f}",
            f"{row['attention_distance']:.3f}",
        )
    return table


def mean_and_spread(mean: float, std: float | None, sign: str = "") -> str:
    """Return ``"52.23 ± 0.27"``, in percent; ``sign`` as in a format specification."""
    return f"{mean:{sign}.2f}" + ("" if std is None else f" ± {std:.2f}")


def _folder(out: Path, bits: int, row: Row, seed: int) -> Path:
    return out / f"{bits}-bit" / row.name / f"seed-{seed}"


def _analyse(teacher: FloatModel, result: Result, data: ImageSets, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Return what is measured of a finished run beside its accuracy."""
    batches = _analysed_batches(result.spec, data, options)
    teacher.model.to(batches[0][0].device)
    layers = query_key_statistics(result.model, batches)
    distance = attention_distance(teacher.model, result.model, batches).nanmean(dim=1).tolist()
    by_layer: list[dict[str, Any]] = [
        {**layer.to_dict(), "attention_distance": far} for layer, far in zip(layers, distance, strict=True)
    ]
    if result.history:
        loss_fn = DistillationLoss(teacher.model, guided_weight=recipe.hyperparameters("quantized").guided_weight)
        for record, gradients in zip(by_layer, loss_gradients(result.model, loss_fn, batches), strict=True):
            record["gradients"] = dataclasses.asdict(gradients)
    means = {name: statistics.fmean(layer[name] for layer in by_layer) for name in _MEANS}
    return {**means, "layers": by_layer}


def _analysed_batches(spec: ModelSpec, data: ImageSets, options: Options) -> list[tuple[Tensor, Tensor]]:
    """Return validation images and labels, always the same ones, of all classes mixed."""
    device = make_accelerator(options).device
    loader = training_batches(data.val, spec, 128, dataclasses.replace(options, seed=0))
    batches: list[tuple[Tensor, Tensor]] = []
    for batch in readable(loader, skip_corrupt=options.skip_corrupt):
        batches.append((batch.images.to(device), batch.labels.to(device)))
        if sum(len(labels) for _, labels in batches) >= ANALYSED_IMAGES:
            break
    return batches


def _check_same_experiment(
    data: ImageSets,
    recipe: Recipe,
    options: Options,
    teacher: FloatModel,
    ladder: Sequence[int] | None,
    overrides: Overrides | None,
) -> None:
    """Keep beside the results what they depend on, and refuse to mix them with those of something else."""
    spec = dataclasses.asdict(teacher.spec)
    del spec["recipe"]  # its weights count, not how they came about
    experiment = json.loads(
        json.dumps(
            {
                "recipe": recipe.to_dict(),
                "teacher": spec,
                "ladder": ladder,
                "overrides": overrides or {},
                "precision": options.precision,
                "accumulate": options.accumulate,
                "decode_once": isinstance(data.train, ResidentImages),
                "images": [len(images) for images in (data.train, data.val)],  # type: ignore[arg-type]
            }
        )
    )
    path = options.out / "experiment.json"
    if path.exists():
        try:
            found = {"overrides": {}, **json.loads(path.read_text())}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: give another --out.") from error
        other = differences(found, experiment)
        if other:
            raise CheckpointError(f"{options.out} holds results with {other}: give another --out.")
        return
    check_absent(report_of(options.out))  # from here on it is this ablation's, and made anew with every result
    write_text(path, json.dumps(experiment, indent=1) + "\n")
