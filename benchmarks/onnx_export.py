"""Packed models as ONNX files in ONNX Runtime and OpenVINO: codes, classes, size, and time beside the engine.

First the small models of benchmarks/family_agreement.py, calibrated, one per family, on real images: of `--exact` in
ONNX Runtime, codes that differ from the reference's, and those of them before which nothing in their image differed (a
value beside a border between two codes, which rounding takes to the other side; everything after it in its image then
differs); of every file in every runtime, images that get the reference's class. Then models of timm's size with random
weights: size of the ONNX file beside the packed one, and milliseconds of one image on one thread, medians of rounds in
which every runtime has its turn. OpenVINO computes in float32. What a runtime does not run is listed with its error.

Example: python benchmarks/onnx_export.py cifar10/train --bits 4
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from family_agreement import CLASSES, MODELS, PREPROCESSING, float_model
from qvit import QuantConfig, calibrate, export, quantize
from qvit.bench.compare import PAUSE
from qvit.bench.peers import Images, Runner, onnx_session, openvino_request
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import open_data
from qvit.exporting.onnx_file import export_onnx, onnx_model
from qvit.files import first_line
from qvit.format.packed import PackedModel, read_packed
from qvit.runtime.engine import load
from qvit.runtime.reference import ReferenceEngine
from random_models import write_random

SIZES = {
    "deit_tiny_patch16_224": 224,
    "deit_small_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "beit_base_patch16_224": 224,
    "vit_relpos_small_patch16_224": 224,
    "eva02_tiny_patch14_224": 224,
    "vit_small_patch16_dinov3": 256,
    "vit_base_patch16_siglip_gap_224": 224,
}
"""Models of timm's, of every family, and their image size."""
Codes = dict[str, NDArray[np.int64]]


def _openvino(path: Path, threads: int) -> Runner:
    return openvino_request(openvino.Core().read_model(path), threads, INFERENCE_PRECISION_HINT="f32")


RUNTIMES: dict[str, Callable[[Path, int], Runner]] = {"ONNX Runtime": onnx_session, "OpenVINO": _openvino}
FILES = [("QDQ", False), ("exact", True)]
"""The two kinds of files."""


def some_images(data: str, count: int) -> torch.Tensor:
    """Return images of a folder of class folders, one in so many, so that all classes are among them."""
    loader = make_loader(open_data(data).val, make_transform(PREPROCESSING), 512, shuffle=False)
    images = torch.cat([batch.images for batch in loader])
    return images[:: max(1, len(images) // count)][:count].contiguous()


def student_file(path: Path, name: str, options: dict[str, object], images: torch.Tensor, bits: int) -> PackedModel:
    """Write the calibrated student of a small model as a packed file, and return what is in it."""
    student = quantize(float_model(name, options), QuantConfig(bits, bits))
    calibrate(student, [images[:64]])
    export(student, path, preprocessing=PREPROCESSING, classes=[str(n) for n in range(CLASSES)], replace=True)
    return read_packed(path)


def codes_of(packed: PackedModel, images: Images, opset: int | None, like: Codes) -> Codes:
    """Return the codes of ``--exact`` in ONNX Runtime, signed and shaped as the reference's."""
    model, bits = onnx_model(packed, exact=True, opset=opset), packed.program.bits()
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in bits)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = {}
    for name, stored in zip(bits, session.run(list(bits), {"images": images}), strict=True):
        codes = stored.astype(np.int64)
        if stored.dtype == np.uint8 and not name.endswith(".map"):
            codes -= 2 ** (bits[name].activation - 1)
        shape = like[name].shape
        found[name] = np.broadcast_to(codes.reshape(-1, *shape[1:]), shape)
    return found


def differences(found: Codes, expected: Codes, images: int) -> tuple[int, int, int]:
    """Return how many codes differ, how many of these in images without a difference before, and all codes."""
    differ = first = total = 0
    clean = np.ones(images, bool)
    for name, wanted in expected.items():
        wrong = (found[name] != wanted).reshape(images, -1)
        differ, total = differ + int(wrong.sum()), total + wrong.size
        first += int(wrong[clean].sum())
        clean &= ~wrong.any(axis=1)
    return differ, first, total


def agreement(images: torch.Tensor, bits: int, opset: int | None, folder: Path, errors: dict[str, str]) -> Table:
    """Return the table of codes and classes."""
    table = Table("family", "codes that differ", "of these first", "of", title=f"{bits} bits, {len(images)} images")
    for runtime in RUNTIMES:
        for kind, _ in FILES:
            table.add_column(f"{runtime}, {kind}: same class (%)", justify="right")
    for family, (name, options) in MODELS.items():
        packed = student_file(folder / "model.safetensors", name, options, images, bits)
        expected: Codes = {}
        logits = ReferenceEngine(packed, expected.__setitem__)(images.numpy())
        found = codes_of(packed, images.numpy(), opset, expected)
        row = [family, *map(str, differences(found, expected, len(images)))]
        for runtime, read in RUNTIMES.items():
            for kind, exact in FILES:
                path = folder / "model.onnx"
                export_onnx(folder / "model.safetensors", path, exact=exact, opset=opset, replace=True)
                try:
                    same = read(path, 1)(images.numpy()).argmax(1) == logits.argmax(1)
                except Exception as error:  # of any kind, a runtime's own
                    errors[f"{runtime}, {kind}, {family}"] = reason(error)
                    row.append("-")
                else:
                    row.append(f"{100 * same.mean():.1f}")
        table.add_row(*row)
    return table


def speed(bits: int, opset: int | None, rounds: int, folder: Path, errors: dict[str, str]) -> Table:
    """Return the table of sizes and times."""
    table = Table("timm model", "packed (MB)", title=f"{bits} bits, one image, one thread")
    for title in (*(f"{kind}: size (of packed)" for kind, _ in FILES), "engine (ms)"):
        table.add_column(title, justify="right")
    for runtime in RUNTIMES:
        for kind, _ in FILES:
            table.add_column(f"{runtime}, {kind} (ms)", justify="right")
    for name, size in SIZES.items():
        packed = write_random(folder / "model.safetensors", name, bits, size)
        images = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
        runners: dict[str, Runner] = {"engine": load(packed, threads=1)}
        sizes = []
        for kind, exact in FILES:
            path = folder / f"{kind}.onnx"
            export_onnx(packed, path, exact=exact, opset=opset, replace=True)
            sizes.append(path.stat().st_size / packed.stat().st_size)
        for runtime, read in RUNTIMES.items():
            for kind, _ in FILES:
                try:
                    runner = read(folder / f"{kind}.onnx", 1)
                    runner(images)
                except Exception as error:  # of any kind, a runtime's own
                    errors[f"{runtime}, {kind}, {name}"] = reason(error)
                else:
                    runners[f"{runtime}, {kind}"] = runner
        times = timed(runners, images, rounds)
        columns = ["engine", *(f"{runtime}, {kind}" for runtime in RUNTIMES for kind, _ in FILES)]
        row = [name, f"{packed.stat().st_size / 1e6:.2f}", *(f"{ratio:.3f}" for ratio in sizes)]
        table.add_row(*row, *(f"{times[column]:.1f}" if column in times else "-" for column in columns))
    return table


def timed(runners: dict[str, Runner], images: Images, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each runner, all of which have a turn in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            time.sleep(PAUSE)
            run(images)
            start = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def reason(error: Exception) -> str:
    """Return the last line of a runtime's error: OpenVINO begins with where in its source it was."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return first_line(RuntimeError(lines[-1])) if lines else type(error).__name__


def main() -> None:
    """Measure, and print two tables and what did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of class folders")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--opset", type=int)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", choices=("agreement", "speed"), help="one of the two tables [default: both]")
    arguments = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    console, errors = Console(width=200), dict[str, str]()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("qvit", "onnx", "onnxruntime", "openvino")]
    console.print(", ".join(versions))
    with tempfile.TemporaryDirectory(prefix="qvit-onnx-") as folder:
        if arguments.part != "speed":
            images = some_images(arguments.data, arguments.images)
            console.print(agreement(images, arguments.bits, arguments.opset, Path(folder), errors))
        if arguments.part != "agreement":
            console.print(speed(arguments.bits, arguments.opset, arguments.rounds, Path(folder), errors))
    for what, error in errors.items():
        console.print(f"{what}: {error}")


if __name__ == "__main__":
    main()
