"""Whether the engine does what the fake-quantized model does: classes, logits and the codes of every quantizer.

Runs a quantized checkpoint in PyTorch and its export in the engine on the same validation images, and prints top-1 of
both, how often they choose the same class, the distance of the logits, and for each kind of quantizer how many codes
differ. A code differs where the value lay so near the border between two codes that another order of float operations
falls on its other side; from there the difference spreads to what follows in that image. So two more columns: the share
of differing codes that differ by 1, and of images in which no code of that kind differs at all. Below the table: in
which quantizer it begins, in how many images.

Example: python benchmarks/agreement.py runs/q4/best.pt --data digits --json agreement.json
"""

from __future__ import annotations

import argparse
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
from qvit.exporting import export_checkpoint
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.train.checkpoint import load_checkpoint
from qvit.train.data import make_loader, make_transform, open_data

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
                    self._watch(f"{name}.{operand}", getattr(module, f"{operand}_quantizer"))

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
    model, card = load_checkpoint(arguments.checkpoint)
    sets, transform = open_data(arguments.data, mode=card.mode), make_transform(card.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "model.safetensors"
        export_checkpoint(arguments.checkpoint, packed)
        engine = qvit.load(packed)
    logits: dict[str, list[np.ndarray]] = {"fake": [], "engine": []}
    labels, counts = [], Counts()
    for batch in make_loader(sets.val, transform, 64, shuffle=False):
        images = batch.images.numpy()
        with torch.no_grad():
            logits["fake"].append(model(batch.images).numpy())
        logits["engine"].append(engine(images))
        labels.append(batch.labels.numpy())
    recorder, seen = CodeRecorder(model), 0
    for batch in make_loader(sets.val, transform, 64, shuffle=False):
        if seen >= COMPARED_IMAGES:
            break
        seen += len(batch.labels)
        with torch.no_grad():
            model(batch.images)
        theirs = engine.codes(batch.images.numpy())
        counts.next_batch()
        for name, ours in recorder.codes.items():
            codes = patches(ours, engine.architecture.patch_size) if name == "patch_embed.proj" else ours
            counts.add(name, codes, theirs[name])

    fake, ours = np.concatenate(logits["fake"]), np.concatenate(logits["engine"])
    truth = np.concatenate(labels)
    result: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "data": arguments.data,
        "images": len(truth),
        "bits": [card.quant_config["weight_bits"], card.quant_config["activation_bits"]] if card.quant_config else None,
        "top1_fake_quantized": 100 * float((fake.argmax(1) == truth).mean()),
        "top1_engine": 100 * float((ours.argmax(1) == truth).mean()),
        "agreement": 100 * float((fake.argmax(1) == ours.argmax(1)).mean()),
        "logit_distance_mean": float(np.abs(fake - ours).mean()),
        "logit_distance_max": float(np.abs(fake - ours).max()),
        "logit_std": float(fake.std()),
        "instruction_set": engine.instruction_set,
        "code_images": seen,
        "quantizers": counts.result(),
        "begins": dict(counts.beginnings),
    }
    console = Console()
    console.print(
        f"{arguments.checkpoint} on {len(truth)} images of {arguments.data}, {engine.instruction_set}: "
        f"fake-quantized {result['top1_fake_quantized']:.2f}, engine {result['top1_engine']:.2f}, "
        f"same class {result['agreement']:.2f} %, logits apart {result['logit_distance_mean']:.2g} in the mean and "
        f"{result['logit_distance_max']:.2g} at most (their standard deviation: {result['logit_std']:.2g})",
        highlight=False,
        markup=False,
    )
    table = Table(title=f"Codes of {seen} images")
    for column in ("quantizer", "codes", "differ", "per million", "by 1 (%)", "images without (%)"):
        table.add_column(column, justify="left" if column == "quantizer" else "right")
    for row in result["quantizers"]:
        table.add_row(
            row["quantizer"],
            str(row["codes"]),
            str(row["differ"]),
            f"{1e6 * row['differ'] / row['codes']:.1f}",
            f"{row['by_one']:.1f}" if row["differ"] else "",
            f"{row['images_without']:.1f}",
        )
    console.print(table)
    for name, images in counts.beginnings.items():
        console.print(f"It begins in {name} in {images} images.", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


class Counts:
    """How many codes of each kind of quantizer differ, and in which one it begins in how many images."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.beginnings: Counter[str] = Counter()
        self.same: np.ndarray | bool = True

    def next_batch(self) -> None:
        """Say that the next codes are of other images."""
        self.same = True

    def add(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Compare the codes ``(B, ...)`` of one quantizer on a batch; those of a batch in the order they run."""
        kind = "patch_embed" if name == "patch_embed.proj" else name.rpartition(".")[2]
        row = self.rows.setdefault(kind, {"codes": 0, "differ": 0, "one": 0, "images": 0, "touched": 0})
        distance = np.abs(ours.astype(int) - theirs.astype(int)).reshape(len(ours), -1)
        row["codes"] += distance.size
        row["differ"] += int((distance > 0).sum())
        row["one"] += int((distance == 1).sum())
        row["images"] += len(ours)
        touched = (distance > 0).any(axis=1)
        row["touched"] += int(touched.sum())
        if begins := int((touched & self.same).sum()):
            self.beginnings[name] += begins
        self.same = ~touched & self.same

    def result(self) -> list[dict[str, Any]]:
        """Return one record a kind of quantizer, in the order they run."""
        return [
            {
                "quantizer": kind,
                "codes": row["codes"],
                "differ": row["differ"],
                "by_one": 100 * row["one"] / max(row["differ"], 1),
                "images_without": 100 * (1 - row["touched"] / row["images"]),
            }
            for kind, row in self.rows.items()
        ]


if __name__ == "__main__":
    main()
