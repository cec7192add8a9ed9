"""The demo: a float ViT on handwritten digits, then 4 and 2 bits by three methods, packed and run in the engine."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qvit
from qvit.analysis.figures import query_histograms, svg, training_curves
from qvit.analysis.report import Cell, Figure, Section, write_report
from qvit.analysis.report import Table as ReportTable
from qvit.analysis.size import model_size
from qvit.analysis.statistics import QueryKeyStatistics, attention_distance, query_key_statistics
from qvit.bench.compare import compare
from qvit.bench.peers import PEERS
from qvit.data.loader import Batch, make_loader, make_transform
from qvit.data.sources import open_data
from qvit.exporting.packed import origin_of
from qvit.files import all_or_none, check_new, printable
from qvit.models.spec import describe
from qvit.train.lock import alone_in
from qvit.train.methods import METHODS, FloatModel, Result, train_full_precision, train_quantized
from qvit.train.options import Options, make_accelerator
from qvit.train.recipe import Recipe, load_recipe

MODEL = "vit_tiny_patch16_224"
BITS = (4, 2)
DEMO_METHODS = ("ptq", "reconstruct", "baseline", "q-vit")
SHOWN_LAYERS = (0, 1, 3)
"""Blocks whose queries are drawn: the first, the second and the last of four."""
COLUMNS = (
    "bits",
    "method",
    "top-1 (%)",
    "query entropy (bits)",
    "attn. distance",
    "size (kB)",
    "engine top-1 (%)",
    "same class (%)",
    "ms per image",
)
PEER = "torch"


class InEngine(NamedTuple):
    """A packed model in the engine: its file, accuracy, and share of images with the fake-quantized model's class."""

    path: Path
    top1: float
    agreement: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the demo's table, and what the figures need of its run."""

    bits: int | None
    title: str
    top1: float
    queries: list[QueryKeyStatistics]
    distance: float | None
    history: list[dict[str, float]]
    size: int
    packed: InEngine | None

    @property
    def name(self) -> str:
        """Name for curves and figures."""
        return self.title if self.bits is None else f"{self.bits} bits: {self.title}"

    def cells(self, milliseconds: float) -> list[str]:
        """Return the line as text, in the order of :data:`COLUMNS`."""
        entropies = [layer.query_entropy for layer in self.queries if layer.query_entropy is not None]
        return [
            "32" if self.bits is None else str(self.bits),
            self.title,
            f"{self.top1:.2f}",
            f"{statistics.fmean(entropies):.2f} of {self.bits}" if entropies else "",
            "" if self.distance is None else f"{self.distance:.3f}",
            f"{self.size / 1e3:.1f}",
            "" if self.packed is None else f"{self.packed.top1:.2f}",
            "" if self.packed is None else f"{self.packed.agreement:.2f}",
            f"{milliseconds:.2f}",
        ]


def run_demo(out: Path, console: Console, seed: int = 0, changes: Sequence[str] = ()) -> Path:
    """Train, quantize, pack, run in the engine, print the table and write ``report.html``.

    Of a demo that is finished in ``out``, it says where the report is, and how to run another.

    Args:
        out: folder for the report, the packed files and a folder a run.
        console: where progress and the table go.
        seed: of every run.
        changes: of the digits' recipe, as :func:`qvit.train.recipe.load_recipe` takes them.

    Returns:
        The report's path.

    Raises:
        ConfigError: if something is there that would be replaced, or another command is writing to the folder.
    """
    report, packed = out / "report.html", [_packed_file(out, bits, method) for bits in BITS for method in DEMO_METHODS]
    outputs = [report, out / "float", *(out / f"{bits}-bit" for bits in BITS), *packed]
    if all(path.exists() for path in outputs):
        again = f"to run it again, move {out} away or give another --out"
        console.print(Text(printable(f"The demo is finished. Report: {report}; {again}.")), soft_wrap=True)
        return report
    check_new(outputs, f"move {out} away")
    with alone_in(out, make_accelerator(Options(out, cpu=True))), all_or_none(outputs):
        _demo(out, report, console, seed, changes)
    return report


def _packed_file(out: Path, bits: int, method: str) -> Path:
    return out / f"{method}-{bits}-bit.safetensors"


def _demo(out: Path, report: Path, console: Console, seed: int, changes: Sequence[str]) -> None:
    started = time.perf_counter()
    recipe, data = load_recipe("digits", changes), open_data("digits", mode="L")
    spec = describe(MODEL, recipe.model_args, data.classes, recipe.preprocessing)
    loader = make_loader(data.val, make_transform(spec.preprocessing), 128, shuffle=False)
    batches = list(loader)

    with _one_thread():
        console.rule("full precision")
        made = train_full_precision(spec, data, recipe, Options(out / "float", seed=seed, cpu=True), console)
        teacher = FloatModel(made.model, made.spec)
        rows = [_row(None, "full precision", made, teacher, batches, None)]
        for bits in BITS:
            for method in DEMO_METHODS:
                title = METHODS[method].title
                console.rule(f"{bits} bits: {title}")
                options = Options(out / f"{bits}-bit" / method, seed=seed, cpu=True)
                result = train_quantized(teacher, teacher, method, (bits, bits), "head", data, recipe, options, console)
                packed = _in_engine(result, _packed_file(out, bits, method), batches)
                rows.append(_row(bits, title, result, teacher, batches, packed))
    console.rule("speed, one image at a time")
    milliseconds = _milliseconds(rows)

    images = made.accuracy.images
    cells = [row.cells(milliseconds[row.name]) for row in rows]
    table = Table(
        title=f"Handwritten digits, {images} validation images, seed {seed}",
        caption="All figures are of the last epoch's weights, which the packed files hold.",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    for number, column in enumerate(COLUMNS):
        width = max(len(line[number]) for line in cells)
        heading = textwrap.fill(column, max(width, *map(len, column.split())))  # headings break, cells do not
        table.add_column(heading, justify="left" if column == "method" else "right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    console.print()
    console.print(table)
    minutes = (time.perf_counter() - started) / 60
    write_report(
        report, "qvit demo: handwritten digits at 4 and 2 bits", _sections(rows, cells, recipe, images, seed, minutes)
    )
    console.print(Text(printable(f"{minutes:.1f} minutes. Report: {report}")), soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread: on images of 8 x 8 the others wait more than they work.

    Beside another busy program they wait so long that the demo takes ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row(
    bits: int | None,
    title: str,
    result: Result,
    teacher: FloatModel,
    batches: Sequence[Batch],
    packed: InEngine | None,
) -> Row:
    return Row(
        bits,
        title,
        result.accuracy.top1,
        query_key_statistics(result.model, batches),
        None if bits is None else float(attention_distance(teacher.model, result.model, batches).mean()),
        result.history,
        model_size(result.model).total if packed is None else packed.path.stat().st_size,
        packed,
    )


@torch.no_grad()
def _in_engine(result: Result, path: Path, batches: Sequence[Batch]) -> InEngine:
    """Export a quantized model, load the file and compare the engine's classes with the model's and the labels."""
    spec, model = result.spec, result.model.eval()
    qvit.export(model, path, preprocessing=spec.preprocessing, classes=spec.classes, origin=origin_of(spec))
    engine = qvit.load(path)
    right: list[bool] = []
    same: list[bool] = []
    for batch in batches:
        predicted = engine(batch.images.numpy()).argmax(axis=1)
        right += (predicted == batch.labels.numpy()).tolist()
        same += (predicted == model(batch.images).argmax(dim=1).numpy()).tolist()
    return InEngine(path, 100 * float(np.mean(right)), 100 * float(np.mean(same)))


def _milliseconds(rows: Sequence[Row]) -> dict[str, float]:
    """Return the median latency of each row's model: one image, one thread, all in one interleaved run."""
    models = {row.name: row.packed.path for row in rows if row.packed is not None}
    comparison = compare(models, [1], [1], peers=[PEER])
    names = {PEERS[PEER].title: rows[0].name}
    return {names.get(timing.runtime, timing.runtime): 1e3 * timing.median for timing in comparison.timings}


def _sections(
    rows: Sequence[Row], cells: Sequence[Sequence[Cell]], recipe: Recipe, images: int, seed: int, minutes: float
) -> list[Section]:
    float_row, quantized = rows[0], rows[1:]
    arguments = ", ".join(f"{name} {value}" for name, value in recipe.model_args.items())
    full, half = recipe.hyperparameters("full_precision"), recipe.hyperparameters("quantized")
    result = Section(
        "Result",
        [
            f"A small vision transformer (four layers, width 48) learns 8 x 8 handwritten digits in {full.epochs} "
            "epochs at full precision. The same float model is then quantized, weights and activations of every linear "
            "layer and of both attention products: without training (post-training), from the float model's outputs on "
            f"{half.reconstruction_images} images without their labels (reconstructed), with plain quantization-aware "
            f"training (the QAT baseline), and with Q-ViT; both trainings have {half.epochs} epochs. Each quantized "
            "model is then exported to a packed file and run by qvit's engine, in integer arithmetic, without PyTorch.",
            "What these numbers can show: that the whole chain works, that 2 bits need training and 4 bits hardly do, "
            "and what happens to the queries. What they cannot show: which of two trained methods is better. There "
            f"are {images} validation images: one image is {100 / images:.2f} points, the standard error of an "
            f"accuracy near 95 % is {100 * (0.95 * 0.05 / images) ** 0.5:.1f} points, and another seed moves a result "
            "by a point or more. Use qvit ablate with several seeds and your own images for that.",
        ],
        [
            ReportTable(
                COLUMNS,
                cells,
                "Query entropy: mean over layers and heads of the entropy of the query codes, at most the number of "
                "bits. Attn. distance: mean total variation distance (0 to 1) between the attention maps of the "
                "float model and the quantized one. Size: of the packed file; of the float model's weights. Engine "
                "top-1 and same class: the packed file in qvit's engine, and the share of images to which it gives the "
                "same class as the fake-quantized model in PyTorch. Milliseconds: median of one image on one thread, "
                "quantized models in the engine, the float model in PyTorch; a model this small measures the "
                "overhead around the arithmetic, qvit bench measures real ones.",
            )
        ],
    )
    curves = Section(
        "Training",
        ["Loss on the augmented training images and top-1 on the validation images, epoch by epoch."],
        figures=[
            Figure(
                svg(training_curves({row.name: row.history for row in rows if row.history})),
                "Full precision trains on the labels with label smoothing; the quantized models on labels and "
                "teacher, Q-ViT with the guided distance added: their losses are not on one scale.",
                "Training loss and validation accuracy over the epochs for the float model, baseline and Q-ViT",
            )
        ],
    )
    histograms = Section(
        "Queries",
        [
            "The paper's Figure 1 for this model: values of the queries just before they are quantized, with the "
            "Gaussian of the same mean and standard deviation over them. Q-ViT's aim is that the quantized model's "
            "queries stay distributed as the float model's, and that their codes carry as many bits as they can."
        ],
        figures=[
            Figure(
                svg(query_histograms(_compared(float_row, quantized, bits), SHOWN_LAYERS)),
                f"{bits} bits: full precision, QAT baseline and Q-ViT in blocks {', '.join(map(str, SHOWN_LAYERS))}.",
                f"Histograms of query values with fitted Gaussians at {bits} bits",
            )
            for bits in BITS
        ],
    )
    made = Section(
        "How this was made",
        [
            f"qvit demo, seed {seed}, in {minutes:.1f} minutes with qvit {qvit.__version__}, PyTorch "
            f"{torch.__version__}, timm {timm.__version__} and Python {platform.python_version()} on "
            f"{platform.machine()}, trained in one thread. Model {MODEL} with "
            f"{arguments}; full precision: {full.optimizer}, learning rate {full.lr:g}, batch "
            f"{full.batch_size}; quantized: {half.optimizer}, learning rate {half.lr:g}, batch {half.batch_size}, "
            f"guided weight {half.guided_weight:g}. All figures are of the last epoch's weights. The digits are "
            "scikit-learn's copy of the UCI set by Alpaydin and Kaynak."
        ],
    )
    return [result, curves, histograms, made]


def _compared(float_row: Row, quantized: Sequence[Row], bits: int) -> dict[str, list[QueryKeyStatistics]]:
    trained = {row.name: row.queries for row in quantized if row.bits == bits and row.history}
    return {float_row.name: float_row.queries, **trained}
