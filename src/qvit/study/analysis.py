"""Models side by side on the same images: the run of ``qvit analyze``, from checkpoints to a report."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from qvit._version import __version__
from qvit.analysis.attention_range import AttentionGrid, attention_grids
from qvit.analysis.bottleneck import KINDS, PARTS, Places, Tried, cells_of, grid_of, overrides_of, variants_of
from qvit.analysis.examination import Examination
from qvit.config import MAX_BITS, QuantConfig, bits_text, check_count
from qvit.data.loader import Prepared, make_loader, make_transform, readable
from qvit.data.order import Sample
from qvit.errors import ConfigError, DataError
from qvit.files import all_or_none, check_new, printable
from qvit.models.checkpoint import weights_checksum
from qvit.models.queries import attention_layers, run_with_maps
from qvit.models.spec import ModelSpec
from qvit.nn.modes import evaluating
from qvit.quantization.calibrate import calibrate
from qvit.quantization.convert import quantize
from qvit.study.analysis_report import write_analysis
from qvit.study.analysis_sections import Drawn
from qvit.study.subjects import CALIBRATION_IMAGES, Material, Subject
from qvit.train.display import progress_bar
from qvit.train.lock import alone_in
from qvit.train.methods import FloatModel, train_quantized
from qvit.train.options import Options, make_accelerator
from qvit.train.recipe import Recipe
from qvit.train.run import can_go_on

CELL_IMAGES = 256
"""Images of the heat map, in which every kind of quantizers of every block is tried alone."""
PICTURES = 3
"""Pictures of which attention maps are drawn."""
_BATCH = 64
_MAP_VALUES = 2**26  # of the N x N maps of all layers that are in memory together


_TRAINED = "trained"  # folder of the trainings


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be analysed.

    Args:
        subjects: of one architecture; the reference, if there is one, is among them.
        reference: name of the float model that the others are compared with and the bottleneck study is of.
        source: where the images come from, for people.
        material: the images.
        blocks: attention layers whose queries, keys and maps are drawn; ``None`` for four of them.
        limit: images to look at, at most, evenly spaced; ``None`` for all.
        study_images: of the bottleneck study, at most; 0 for no study.
        bits: of the bottleneck study.
        recipe: with whose ``quantized`` hyperparameters every part is trained; ``None`` to calibrate alone.
    """

    subjects: Sequence[Subject]
    reference: str | None
    source: str
    material: Material
    blocks: Sequence[int] | None = None
    limit: int | None = None
    study_images: int = 1000
    bits: int = 4
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_count("limit", self.limit)
        check_count("study_images", self.study_images, 0)


def run_analysis(request: Request, options: Options, console: Console) -> dict[str, Any]:
    """Analyse models and write ``report.html``, ``analysis.json`` and the figures into ``options.out``.

    Returns:
        What ``analysis.json`` holds.

    Raises:
        ConfigError: if the folder holds an analysis, or another command is writing to it, or there is no such block.
        TeacherMismatchError: if the models' layers, heads or tokens differ.
        KeyboardInterrupt: after Ctrl-C, saying what is left of the work.
    """
    accelerator = make_accelerator(options)
    outputs = [options.out / name for name in ("report.html", "analysis.json", "figures")]
    check_new(outputs)
    with alone_in(options.out, accelerator):
        check_new(outputs)  # another command may have filled it since
        try:
            result, drawn = _analysed(request, options, console, accelerator.device)
            if request.recipe is not None:
                result["study"]["trained"] = _trained(request, request.recipe, options, console)
        except KeyboardInterrupt:
            trained = options.out / _TRAINED
            left = (
                f"the same command goes on with the trainings in {trained}" if trained.exists() else "nothing is kept"
            )
            raise KeyboardInterrupt(f"Interrupted; {left}.") from None
        # Drawing takes long, and what ends it may be a signal: what is half done must not have the names of a whole.
        with all_or_none(outputs), tempfile.TemporaryDirectory(prefix=".analysis.", dir=options.out) as folder:
            write_analysis(Path(folder), result, drawn)
            for output in outputs:
                os.replace(Path(folder) / output.name, output)
    return result


def _analysed(
    request: Request, options: Options, console: Console, device: torch.device
) -> tuple[dict[str, Any], Drawn]:
    ordered = sorted(request.subjects, key=lambda subject: subject.name != request.reference)  # the reference first
    for subject in ordered:
        subject.model.to(device)
    spec = request.subjects[0].spec
    size = spec.preprocessing["input_size"][1], spec.preprocessing["input_size"][2]
    grids = attention_grids(ordered[0].model, size)
    shown = _shown(request.blocks, len(grids))
    examinations: dict[str, Examination] = {}
    for subject in ordered:
        reference = None if request.reference is None else examinations.get(request.reference)
        examinations[subject.name] = Examination(subject.model, grids, reference)
    chosen = _some(request.material.images, request.limit)
    with progress_bar(console) as bar:
        at_once = _at_once(ordered[0].model, grids)
        for images, labels in _batches(chosen, request, options, bar, "images", device, at_once):
            attended = None
            for name, examination in examinations.items():
                try:
                    given = examination.add(images, labels, attended)
                except DataError as error:
                    raise DataError(f"{name}: {error}") from error
                attended = given if name == request.reference else attended
        drawn = _drawn(request, ordered, {layer: grids[layer] for layer in shown}, device)
        study = (
            _studied(request, options, bar, ordered[0], device) if request.study_images and request.reference else None
        )
    result = {
        "qvit": __version__,
        "source": request.source,
        "images": next(iter(examinations.values())).images,
        "image_size": list(size),
        "reference": request.reference,
        "blocks": shown,
        "models": {
            subject.name: {
                "architecture": subject.spec.name,
                "method": subject.spec.method,
                "bits": _bits(subject.spec),
                "overrides": (subject.spec.quant_config or {}).get("overrides", {}),
                "weights": weights_checksum(subject.model),
                **examinations[subject.name].result(),
            }
            for subject in ordered
        },
        "study": study,
    }
    return result, drawn


def _studied(request: Request, options: Options, bar: Bar, reference: Subject, device: torch.device) -> dict[str, Any]:
    """Return the bottleneck study of the reference, calibrated: parts, and kinds of quantizers block by block."""
    student = quantize(reference.model, QuantConfig(request.bits, request.bits, rectifier=None))
    calibration = _some(request.material.calibration, CALIBRATION_IMAGES)
    batches = [images for images, _ in _batches(calibration, request, options, bar, "calibration images", device)]
    task = bar.add_task("calibration", total=None)
    calibrate(student, batches, report=lambda done, total: bar.update(task, completed=done, total=total))
    bar.remove_task(task)
    places = Places(student)
    parts, cells = (Tried(reference.model, student, variants) for variants in (variants_of(places), cells_of(places)))
    for tried, count, title in (
        (parts, request.study_images, "bottleneck study"),
        (cells, min(request.study_images, CELL_IMAGES), "bottleneck study by block"),
    ):
        for images, labels in _batches(_some(request.material.images, count), request, options, bar, title, device):
            tried.add(images, labels)
    return {
        "bits": request.bits,
        "images": parts.images,
        "cell_images": cells.images,
        "float_top1": parts.float_top1(),
        "parts": parts.result(),
        "blocks": places.blocks,
        "kinds": list(KINDS),
        "cells": grid_of(places, cells.result(), "distance"),
    }


def _trained(request: Request, recipe: Recipe, options: Options, console: Console) -> dict[str, float]:
    """Return top-1 of each part with few bits alone, 8 elsewhere, trained from the reference; all with one budget."""
    assert request.material.data is not None
    subject = next(subject for subject in request.subjects if subject.name == request.reference)
    teacher = FloatModel(subject.model, subject.spec)  # type: ignore[arg-type]
    places = Places(quantize(subject.model, QuantConfig(request.bits, request.bits, rectifier=None)))
    top1 = {}
    for number, part in enumerate(PARTS, 1):
        folder = options.out / _TRAINED / part.lower().replace(" ", "-")
        console.print(f"[{number}/{len(PARTS)}] {part} at {request.bits} bits, trained", markup=False)
        run = dataclasses.replace(options, out=folder, resume=can_go_on(folder))
        overrides = overrides_of(places.of_part(part), request.bits)
        result = train_quantized(
            teacher,
            teacher,
            "baseline",
            (MAX_BITS, MAX_BITS),
            "head",
            request.material.data,
            recipe,
            run,
            console,
            overrides,
        )
        top1[part] = result.accuracy.top1
    return top1


def _drawn(
    request: Request, subjects: Sequence[Subject], shown: Mapping[int, AttentionGrid], device: torch.device
) -> Drawn:
    """Return a few pictures and every model's maps of them, in the attention layers that are shown."""
    preprocessing = request.subjects[0].spec.preprocessing
    mean, std = (torch.tensor(preprocessing[name]).view(-1, 1, 1) for name in ("mean", "std"))
    prepared = Prepared(request.material.images, make_transform(preprocessing), substitute=False)
    drawn = Drawn([], [], {layer: {subject.name: [] for subject in subjects} for layer in shown})
    for index in _some(request.material.images, PICTURES).indices:
        image, *_ = prepared[Sample(index)]
        if image is None:  # it was counted before
            continue
        pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        drawn.pictures.append(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        drawn.titles.append(_title(request, index))
        for subject in subjects:
            with torch.no_grad(), evaluating(subject.model):
                _, maps = run_with_maps(subject.model, image[None].to(device))
            for layer, grid in shown.items():
                drawn.maps[layer][subject.name].append(grid.received(maps[layer])[0].cpu().numpy())
    return drawn


def _title(request: Request, index: int) -> str:
    """Return what a picture is called: its file, and its class where it has one."""
    sources, labels = (getattr(request.material.images, name, None) for name in ("sources", "labels"))
    named = Path(sources[index]).name if sources is not None and isinstance(sources[index], str) else f"image {index}"
    return (
        named
        if request.material.classes is None or labels is None
        else f"{request.material.classes[labels[index]]}: {named}"
    )


def _batches(
    images: Dataset[Any],
    request: Request,
    options: Options,
    bar: Bar,
    title: str,
    device: torch.device,
    at_once: int = _BATCH,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images, ``at_once`` at most, and their labels, prepared for the models, and show how many there were.

    Raises:
        DataError: if none can be read.
    """
    loader = make_loader(
        images,
        make_transform(request.subjects[0].spec.preprocessing),
        _BATCH,
        shuffle=False,
        workers=options.workers,
        device=device,
    )
    task = bar.add_task(title, total=len(images))  # type: ignore[arg-type]
    count = unreadable = 0
    for batch in readable(loader, skip_corrupt=options.skip_corrupt):
        unreadable += len(batch.unreadable)
        for start in range(0, len(batch.labels), at_once):
            part = slice(start, start + at_once)
            labels = None if request.material.classes is None else batch.labels[part].to(device)
            yield batch.images[part].to(device), labels
            count += len(batch.labels[part])
            bar.update(task, completed=count + unreadable)
    bar.remove_task(task)
    if unreadable:
        bar.console.print(f"Unreadable {title} skipped: {unreadable}.")
    if not count:
        raise DataError(f"None of the {title} can be read, so there is nothing to analyse.")


def _at_once(model: nn.Module, grids: Sequence[AttentionGrid]) -> int:
    """Return of how many images the maps of all layers fit in memory together."""
    values = 0
    for layer, grid in zip(attention_layers(model), grids, strict=True):
        windows = math.prod(grid.grid) // math.prod(grid.window)
        values += layer.num_heads * windows * (grid.prefix + math.prod(grid.window)) ** 2
    return max(1, min(_BATCH, _MAP_VALUES // values))


def _some(images: Dataset[Any], count: int | None) -> Subset[Any]:
    """Return ``count`` images at most, evenly spaced: data sets are often in the order of their classes."""
    total: int = len(images)  # type: ignore[arg-type]
    wanted = total if count is None else min(count, total)
    return Subset(images, [index * total // wanted for index in range(wanted)])


def _shown(blocks: Sequence[int] | None, count: int) -> list[int]:
    if blocks is None:
        return sorted({0, count // 3, 2 * count // 3, count - 1})
    for block in blocks:
        if not 0 <= block < count:
            raise ConfigError(f"There is no block {block}: the attention layers are 0 to {count - 1} (--blocks).")
    return sorted(set(blocks))


def _bits(spec: ModelSpec) -> tuple[int, int] | None:
    config = spec.quant_config
    return None if config is None else (config["weight_bits"], config["activation_bits"])


def summary(result: Mapping[str, Any], out: Path) -> list[Any]:
    """Return what an analysis has found in short, to be printed."""
    table = Table(title=printable(f"{result['images']} images of {result['source']}"))
    noisiest: list[str] = []
    for column in ("model", "bits", "top-1 (%)", "same class (%)", "lowest SNR (dB)"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for name, model in result["models"].items():
        lossy = [noise for noise in model["quantizers"] if noise["snr"] is not None]
        least = min(lossy, key=lambda noise: noise["snr"], default=None)
        table.add_row(
            printable(name),
            "32" if model["bits"] is None else bits_text(model["bits"], model["overrides"]),
            f"{model['top1']:.2f}" if "top1" in model else "",
            f"{model['same_class']:.2f}" if "same_class" in model else "",
            "" if least is None else f"{least['snr']:.1f}",
        )
        noisiest += [] if least is None else [printable(f"{name}: the lowest is that of {least['name']}.")]
    return [table, *noisiest, printable(f"Report in {out / 'report.html'}, numbers in {out / 'analysis.json'}")]
