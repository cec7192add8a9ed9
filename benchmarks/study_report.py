"""Tables and figures of the study, from the one file that ``study.py collect`` wrote."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvit.analysis.figures import svg
from qvit.analysis.statistics import QueryKeyStatistics
from qvit.errors import DataError
from qvit.files import write_text
from qvit.study.ablation import interval_of, mean_and_spread, rows_named, summarise
from qvit.study.report import ablation_figures
from study_plan import Experiment, Plan

Record = Mapping[str, Any]


def write_report(plan: Plan, results: Path, document: Path) -> None:
    """Write the study's section of ``document`` anew, between its two markers, and its figures beside it.

    Args:
        plan: says what each experiment is.
        results: what ``collect`` wrote.
        document: Markdown with the lines ``<!-- study: NAME -->`` and ``<!-- end of study -->``, NAME being that of
            ``results`` without its ending.

    Raises:
        DataError: if the document has no such lines, or the results are not of the plan.
    """
    name = results.stem
    begin, end = f"<!-- study: {name} -->", "<!-- end of study -->"
    before, marker, rest = document.read_text().partition(begin)
    _, closing, after = rest.partition(end)
    if not marker or not closing:
        raise DataError(f"{document} has no lines {begin} and {end}: put them where the study belongs.")
    teacher, *records = [json.loads(line) for line in results.read_text().splitlines()]
    unknown = {record["experiment"] for record in records} - {experiment.name for experiment in plan.experiments}
    if unknown:
        raise DataError(f"{results} holds {sorted(unknown)[0]}, which is not in the plan.")
    folder = document.parent / "figures"
    parts = [_teacher(teacher)]
    for experiment in plan.experiments:
        matching = [record for record in records if record["experiment"] == experiment.name]
        if experiment.table and matching:
            parts.append(_table(experiment, matching))
            if experiment.figures:
                parts += _figures(experiment, matching, teacher, folder, name)
    parts += [_trials(plan, records), _best(plan, records)]
    write_text(document, before + begin + "\n\n" + "\n\n".join(part for part in parts if part) + "\n\n" + end + after)


def _teacher(teacher: Record) -> str:
    machine, hyperparameters = teacher["machine"], teacher["recipe"]["full_precision"]
    where = machine["gpu"] or machine["processor"]
    return (
        f"Teacher: {teacher['parameters']:,} parameters, {hyperparameters['epochs']} epochs in full precision, top-1 "
        f"**{teacher['top1']:.2f}**, SHA-256 of the weights `{teacher['weights'][:16]}`. Machine: {where}; PyTorch "
        f"{machine['torch']}, timm {machine['timm']}, Python {machine['python']}."
    )


def _table(experiment: Experiment, records: Sequence[Record]) -> str:
    epochs = max(len(record["history"]) for record in records)
    rows = []
    for row in summarise(records):
        early = [r["history"][0]["val_top1"] for r in records if _is_of(r, row) and r["history"]]
        rows.append(
            [
                row["bits"],
                row["title"],
                row["seeds"],
                f"{statistics.fmean(early):.2f}" if early else "",
                mean_and_spread(row["top1"], row["top1_std"]),
                "" if row["gain"] is None else mean_and_spread(row["gain"], row["gain_interval"], "+"),
                ", ".join(f"{gain:+.2f}" for gain in row["gains"]),
                f"{row['query_entropy']:.2f} of {row['bits']}",
                f"{row['attention_distance']:.3f}",
            ]
        )
    columns = (
        "bits, method, seeds, after one epoch (%), top-1 (%), gain over its baseline, each seed's gain, "
        "query entropy (bits), attention distance"
    )
    return (
        f"### {experiment.name}: {experiment.why}\n\nEpochs of training a run: {epochs}. Recipe changes: "
        f"{_changes(experiment)}. ± of top-1 is the deviation over the seeds, of a gain its 95 % interval.\n\n"
        f"{_markdown(columns.split(', '), rows)}"
    )


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; all columns but those of words are aligned to the right."""
    words = ("method", "each seed's gain", "what is tried", "changes", "against")
    lines = [columns, ["---" if column in words else "---:" for column in columns], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _figures(
    experiment: Experiment, records: Sequence[Record], teacher: Record, folder: Path, study: str
) -> Iterable[str]:
    statistics_of_teacher = [QueryKeyStatistics.from_dict(layer) for layer in teacher["layers"]]
    for drawing in ablation_figures(records, statistics_of_teacher):
        path = folder / f"{study}-{experiment.name}-{drawing.name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, svg(drawing.figure))
        yield f"![{drawing.caption}](figures/{path.name})\n\n*{drawing.caption}*"


def _trials(plan: Plan, records: Sequence[Record]) -> str:
    """Every experiment that changes one thing, beside the run of the same row, bits and seed that it changes."""
    rows = []
    for experiment in plan.experiments:
        if experiment.against is None:
            continue
        others = {_cell(r): r["top1"] for r in records if r["experiment"] == experiment.against}
        cells: dict[tuple[int, str], list[Record]] = {}
        for record in records:
            if record["experiment"] == experiment.name and _cell(record) in others:
                cells.setdefault((record["bits"], record["title"]), []).append(record)
        for (bits, title), cell in cells.items():
            gains = [record["top1"] - others[_cell(record)] for record in cell]
            gain = mean_and_spread(statistics.fmean(gains), interval_of(gains), "+")
            top1, entropy, distance = (
                statistics.fmean(record[name] for record in cell)
                for name in ("top1", "query_entropy", "attention_distance")
            )
            cells_of_trial = (experiment.why, _changes(experiment), experiment.against, bits, title, len(cell))
            rows.append([*cells_of_trial, f"{top1:.2f}", gain, f"{entropy:.2f}", f"{distance:.3f}"])
    if not rows:
        return ""
    columns = (
        "what is tried, changes, against, bits, method, seeds, top-1 (%), difference, query entropy (bits), "
        "attention distance"
    )
    text = (
        "Each beside the run of the same method, bits and seed of the experiment that it changes; of differences over "
        "several seeds the 95 % interval."
    )
    return f"### Every trial\n\n{text}\n\n{_markdown(columns.split(', '), rows)}"


def _best(plan: Plan, records: Sequence[Record]) -> str:
    """The best model of each number of bits, and the command that makes it again."""
    experiments = {e.name: e for e in plan.experiments if not e.overrides and not e.ladder}
    trained = [r for r in records if r["experiment"] in experiments and r["history"]]
    parts = []
    for bits in sorted({record["bits"] for record in trained}, reverse=True):
        best = max((r for r in trained if r["bits"] == bits), key=lambda r: r["top1"])
        (row,) = rows_named(best["row"])
        changes = dict(change.split("=", 1) for change in plan.quantized + experiments[best["experiment"]].set)
        words = [
            f"qvit train {plan.model} --bits {bits} --method {row.method}",
            f"--rectifier {row.rectifier}" if row.rectifier else "",
            f"--teacher study/teacher/model.pt --data cifar10 --recipe {plan.recipe}",
            *(f"--set {shlex.quote(change)}" for change in plan.set),
            *(f"--set {shlex.quote(f'{name}={value}')}" for name, value in changes.items()),
            f"--seed {best['seed']} --decode-once",
            f"--precision {plan.options['precision']}" if "precision" in plan.options else "",
            "--compile" if plan.options.get("compile") else "",
            f"--out best-{bits}-bit",
        ]
        command = " ".join(word for word in words if word)
        parts.append(
            f"{bits} bits: **{best['top1']:.2f}**, {best['title']}, SHA-256 of the weights "
            f"`{best['weights'][:16]}`\n\n    {command}"
        )
    return "### The best trained models\n\n" + "\n\n".join(parts) if parts else ""


def _is_of(record: Record, row: Record) -> bool:
    return (record["bits"], record["row"]) == (row["bits"], row["row"])


def _cell(record: Record) -> tuple[int, str, int]:
    return record["bits"], record["row"], record["seed"]


def _changes(experiment: Experiment) -> str:
    changes = [change.removeprefix("quantized.") for change in experiment.set]
    changes += [f"{name} {bits}" for name, bits in experiment.overrides.items()]
    if experiment.ladder:
        changes.append("bits " + " then ".join(map(str, experiment.bits)))
    return ", ".join(f"`{change}`" for change in changes) or "none"
