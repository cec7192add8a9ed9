"""What calibration alone gives: agreement with the float model, and where rectification starts from.

For each number of bits and each reading of IRM, started from the teacher ("teacher") and as the authors' code does
("unit"): share of validation images given the float model's class, top-1, and the mean total variation distance between
the float model's attention maps and the quantized one's.

Example: qvit train vit_tiny_patch16_224 --full-precision --data digits --out runs/float
         python benchmarks/calibration.py runs/float/best.pt --data digits
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.statistics import attention_distance
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import open_data
from qvit.models.checkpoint import load_checkpoint
from qvit.nn.rectifier import RectifierInit

BITS = (8, 4, 3, 2)
CALIBRATION_IMAGES = 512
INITS: list[tuple[Any, RectifierInit]] = [
    (None, "teacher"),
    ("head", "teacher"),
    ("head", "unit"),
    ("token", "teacher"),
    ("token", "unit"),
]


def main() -> None:
    """Measure, print a table and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="float model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    teacher, spec = load_checkpoint(arguments.checkpoint)
    sets, transform = open_data(arguments.data, mode=spec.mode), make_transform(spec.preprocessing)
    torch.manual_seed(0)
    images = next(iter(make_loader(sets.train, transform, CALIBRATION_IMAGES, shuffle=True))).images
    batches = list(make_loader(sets.val, transform, 256, shuffle=False))
    labels = torch.cat([batch.labels for batch in batches])

    def classes(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(batch.images).argmax(dim=1) for batch in batches])

    expected = classes(teacher)
    results = []
    for bits in BITS:
        for rectifier, init in INITS:
            student = quantize(teacher, QuantConfig(bits, bits, rectifier=rectifier))
            calibrate(student, [images], rectifier_init=init)
            found = classes(student)
            distance = attention_distance(teacher, student, [batch.images for batch in batches[:2]])
            results.append(
                {
                    "bits": bits,
                    "rectifier": rectifier or "none",
                    "init": init if rectifier else "",
                    "agreement": 100 * float((found == expected).float().mean()),
                    "top1": 100 * float((found == labels).float().mean()),
                    "attention_distance": float(distance.mean()),
                }
            )
    float_top1 = 100 * float((expected == labels).float().mean())
    table = Table(
        title=f"Calibrated, not trained: {len(labels)} images of {arguments.data}, float top-1 {float_top1:.2f}"
    )
    for column in ("bits", "IRM", "init", "agreement %", "top-1 %", "attention distance"):
        table.add_column(column, justify="left" if column in ("IRM", "init") else "right")
    for r in results:
        figures = (f"{r['agreement']:.2f}", f"{r['top1']:.2f}", f"{r['attention_distance']:.4f}")
        table.add_row(str(r["bits"]), str(r["rectifier"]), str(r["init"]), *figures)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"float_top1": float_top1, "results": results}))


if __name__ == "__main__":
    main()
