"""Whether the engine does what the fake-quantized model does: classes, logits and the codes of every quantizer.

Runs a quantized checkpoint in PyTorch, in double precision and in float32, and its export in the engine on the same
validation images. Double precision says what the model is; a code differs from it where a value lies so near the border
between two codes that the rounding of floats takes it to the other side, and from there the difference spreads to what
follows in that image. Prints how near the engine and the float32 model are to it and to each other, how many codes of
each kind of quantizer differ, and in which quantizer it begins, in how many images.

Example: python benchmarks/agreement.py runs/q4/best.pt --data digits --json agreement.json
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qvit
from qvit.cli.options import console as plain_console
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import open_data
from qvit.exporting.packed import export_checkpoint
from qvit.files import printable
from qvit.models.checkpoint import load_checkpoint
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer

COMPARED_IMAGES = 256
"""Images whose codes are compared; classes and logits are compared on all."""


class CodeRecorder:
    """Keeps the unsigned codes of every activation quantizer of a fake-quantized model, by the packed file's names."""

    def __init__(self, model: nn.Module) -> None:
        self.codes: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            if isinstance(module, (QuantLinear, QuantConv2d)):
                self._watch(name, module.input_quantizer)
            elif isinstance(module, QuantAttention):
                for operand in ("query", "key", "value", "attention"):
                    file_name = "map" if operand == "attention" else operand
                    self._watch(f"{name}.{file_name}", getattr(module, f"{operand}_quantizer"))

    def _watch(self, name: str, quantizer: Quantizer) -> None:
        def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.codes[name] = (quantizer.codes(args[0]) - quantizer.low).numpy()

        quantizer.register_forward_pre_hook(keep)


def patches(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the codes of images ``(B, C, H, W)`` as the engine sees them: ``(B, patches, C * ph * pw)``."""
    (b, c, h, w), (ph, pw) = pixels.shape, size
    cut = pixels[:, :, : h // ph * ph, : w // pw * pw].reshape(b, c, h // ph, ph, w // pw, pw)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(b, (h // ph) * (w // pw), c * ph * pw)


def main() -> None:
    """Compare, print two tables and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="quantized model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, spec = load_checkpoint(arguments.checkpoint)
    sets, transform = open_data(arguments.data, mode=spec.mode), make_transform(spec.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "model.safetensors"
        export_checkpoint(arguments.checkpoint, packed)
        engine = qvit.load(packed)
    exact = copy.deepcopy(model).double()
    runs: dict[str, list[np.ndarray]] = {"engine": [], "float32": [], "double": []}
    labels = []
    for batch in make_loader(sets.val, transform, 64, shuffle=False):
        with torch.no_grad():
            runs["float32"].append(model(batch.images).numpy())
            runs["double"].append(exact(batch.images.double()).numpy())
        runs["engine"].append(engine(batch.images.numpy()))
        labels.append(batch.labels.numpy())
    logits, truth = {name: np.concatenate(parts) for name, parts in runs.items()}, np.concatenate(labels)

    counts = {"engine": Counts(), "float32": Counts()}
    recorder, recorder_exact, seen = CodeRecorder(model), CodeRecorder(exact), 0
    for batch in make_loader(sets.val, transform, 64, shuffle=False):
        if seen >= COMPARED_IMAGES:
            break
        seen += len(batch.labels)
        with torch.no_grad():
            model(batch.images)
            exact(batch.images.double())
        engine_codes = engine.codes(batch.images.numpy())
        for count in counts.values():
            count.next_batch()
        for name, codes in recorder_exact.codes.items():
            cut = patches(codes, model.patch_embed.patch_size) if name == "patch_embed.proj" else codes
            counts["engine"].add(name, cut, engine_codes[name])
            counts["float32"].add(name, codes, recorder.codes[name])

    result: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "data": arguments.data,
        "images": len(truth),
        "bits": [spec.quant_config["weight_bits"], spec.quant_config["activation_bits"]] if spec.quant_config else None,
        "instruction_set": engine.instruction_set,
        "top1": {name: 100 * float((values.argmax(1) == truth).mean()) for name, values in logits.items()},
        "logit_std": float(logits["double"].std()),
        "pairs": [
            {"model": a, "beside": b, **distance(logits[a], logits[b])}
            for a, b in (("engine", "double"), ("float32", "double"), ("engine", "float32"))
        ],
        "code_images": seen,
        "quantizers": {name: count.rows for name, count in counts.items()},
        "begins": {name: dict(count.beginnings) for name, count in counts.items()},
    }
    show(result, plain_console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


def distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Return how far logits ``(N, classes)`` are apart; ``same_class`` and ``images_apart`` (by over 1e-3) in %."""
    apart = np.abs(a - b)
    return {
        "same_class": 100 * float((a.argmax(1) == b.argmax(1)).mean()),
        "images_apart": 100 * float((apart.max(1) > 1e-3).mean()),
        "mean": float(apart.mean()),
        "largest": float(apart.max()),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables of a comparison."""
    top1 = ", ".join(f"{name} {value:.2f}" for name, value in result["top1"].items())
    where = printable(f"{result['checkpoint']} on {result['images']} images of {result['data']}")
    console.print(
        f"{where}, {result['instruction_set']}; top-1: {top1}; standard deviation of the logits: "
        f"{result['logit_std']:.2g}"
    )
    table = Table(title="Classes and logits")
    for column in ("model", "beside", "same class (%)", "images apart (%)", "mean distance", "largest"):
        table.add_column(column, justify="left" if column in ("model", "beside") else "right")
    for pair in result["pairs"]:
        table.add_row(
            pair["model"],
            pair["beside"],
            f"{pair['same_class']:.2f}",
            f"{pair['images_apart']:.2f}",
            f"{pair['mean']:.2g}",
            f"{pair['largest']:.2g}",
        )
    console.print(table)
    table = Table(title=f"Codes of {result['code_images']} images that differ from double precision")
    for column in ("quantizer", "codes", "engine", "float32"):
        table.add_column(column, justify="left" if column == "quantizer" else "right")
    for kind, row in result["quantizers"]["engine"].items():
        other = result["quantizers"]["float32"][kind]
        table.add_row(kind, str(row["codes"]), str(row["differ"]), str(other["differ"]))
    console.print(table)
    for name, beginnings in result["begins"].items():
        for quantizer, images in beginnings.items():
            console.print(f"{name}: begins in {quantizer} in {images} images.")


class Counts:
    """How many codes of each kind of quantizer differ, and in which one it begins in how many images."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, int]] = {}
        self.beginnings: Counter[str] = Counter()
        self.same: np.ndarray | bool = True

    def next_batch(self) -> None:
        """Say that the next codes are of other images."""
        self.same = True

    def add(self, name: str, expected: np.ndarray, found: np.ndarray) -> None:
        """Compare the codes ``(B, ...)`` of one quantizer on a batch; those of a batch in the order they run."""
        kind = "patch_embed" if name == "patch_embed.proj" else name.rpartition(".")[2]
        row = self.rows.setdefault(kind, {"codes": 0, "differ": 0})
        differ = (expected.astype(int) != found.astype(int)).reshape(len(expected), -1)
        row["codes"] += differ.size
        row["differ"] += int(differ.sum())
        touched = differ.any(axis=1)
        if begins := int((touched & self.same).sum()):
            self.beginnings[name] += begins
        self.same = ~touched & self.same


if __name__ == "__main__":
    main()
