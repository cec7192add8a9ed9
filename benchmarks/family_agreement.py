"""One small model of every family through the whole chain on real images: calibrate, export, reference, engine.

The weights are random (of a size that keeps attention from being flat), the images are yours: a folder of class
folders, such as CIFAR-10's. Printed per family: codes of the engine that differ from the reference's, per 100 000, and
those of them before which nothing in their image differed, in how many images and quantizers these are; images whose
class in the engine is that of the fake-quantized model in double precision; of the others the largest margin, which is
the distance of the two largest logits in double precision, in percent of the median margin of all images (of a near tie
it is small); the guided distance between the calibrated student and its teacher, which needs their queries and keys
layer by layer. Every difference starts at a value beside a border between two codes.

Example: python benchmarks/family_agreement.py cifar10/train --bits 4 --images 256
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qvit import DistillationLoss, QuantConfig, calibrate, export, quantize
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import open_data
from qvit.format.packed import read_packed
from qvit.runtime.engine import Engine
from qvit.runtime.reference import ReferenceEngine

SIZE, CLASSES = 32, 10
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
WINDOWS: dict[str, Any] = {"img_size": SIZE, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, DeiT": ("deit_tiny_patch16_224", VIT),
    "Swin": ("swin_tiny_patch4_window7_224", {**WINDOWS, "patch_size": 2}),
    "Swin v2": ("swinv2_tiny_window8_256", {**WINDOWS, "patch_size": 2}),
    "BEiT": ("beit_base_patch16_224", {**VIT, "init_values": 0.5}),
    "ViT, relative positions": ("vit_relpos_small_patch16_224", {**VIT, "init_values": 0.5}),
    "EVA-02": ("eva02_tiny_patch14_224", VIT),
    "DINOv3": ("vit_small_patch16_dinov3", {**VIT, "num_classes": CLASSES}),
    "SigLIP": ("vit_base_patch16_siglip_gap_224", {**VIT, "global_pool": "map", "fc_norm": True}),
}
PREPROCESSING = {
    "input_size": [3, SIZE, SIZE],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


def float_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Return a model with random weights whose attention is not flat and whose logits differ from image to image."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **{"num_classes": CLASSES, **arguments}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("logit_scale"):
                parameter.normal_(2.0, std=0.3)
            elif parameter.ndim >= 2 and not any(part in key for part in ("embed", "token", "table")):
                parameter.normal_(std=(2 if "qkv" in key else 1) * parameter[0].numel() ** -0.5)
            elif key.endswith("bias") or "table" in key:
                parameter.normal_(std=0.1)
    return model


def measure(name: str, arguments: dict[str, Any], images: torch.Tensor, bits: int) -> dict[str, Any]:
    """Return what is printed of one family, as plain data."""
    teacher = float_model(name, arguments)
    student = quantize(teacher, QuantConfig(bits, bits))
    calibrate(student, [images[:64]])
    loss_fn = DistillationLoss(teacher)
    loss_fn(student.train(), images[:8], torch.zeros(8, dtype=torch.int64)).backward()
    student.eval()
    with tempfile.TemporaryDirectory(prefix="qvit-families-") as folder:
        path = Path(folder) / "model.safetensors"
        export(student, path, preprocessing=PREPROCESSING, classes=[str(n) for n in range(CLASSES)])
        packed = read_packed(path)
    with torch.no_grad():
        exact = copy.deepcopy(student).double()(images.double()).numpy()
    engine = Engine(packed)
    logits, codes = engine(images.numpy()), engine.codes(images.numpy())
    expected: dict[str, np.ndarray] = {}
    ReferenceEngine(packed, watch=expected.__setitem__)(images.numpy())
    differ = total = 0
    clean = np.ones(len(images), bool)
    first = places = 0  # codes that differ where nothing before them in their image did, and quantizers with some
    for key, wanted in expected.items():
        width = packed.program.bits()[key].activation
        unsigned = wanted if key.endswith(".map") else wanted + 2 ** (width - 1)
        wrong = (codes[key] != unsigned).reshape(len(images), -1)
        differ, total = differ + int(wrong.sum()), total + wrong.size
        first += int(wrong[clean].sum())
        places += bool(wrong[clean].any())
        clean &= ~wrong.any(axis=1)
    second, best = np.sort(exact, axis=1)[:, -2:].T
    margins, same = best - second, logits.argmax(1) == exact.argmax(1)
    return {
        "model": name,
        "codes_per_100000": 1e5 * differ / total,
        "first_codes_per_100000": 1e5 * first / total,
        "images_with_first": 100 * float((~clean).mean()),
        "quantizers_with_first": places,
        "same_class": 100 * float(same.mean()),
        "largest_margin": 100 * float(margins[~same].max() / np.median(margins)) if not same.all() else None,
        "guided_distance": float(loss_fn.last_parts["guided"]),
        "images": len(images),
    }


def main() -> None:
    """Measure every family, print one table and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of class folders")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sets = open_data(arguments.data)
    loader = make_loader(sets.val, make_transform(PREPROCESSING), arguments.images, shuffle=False)
    # One image in so many, so that all classes are among them.
    batches = [batch.images for batch in loader]
    images = torch.cat(batches)
    images = images[:: max(1, len(images) // arguments.images)][: arguments.images].contiguous()
    table = Table(
        "family",
        "timm model",
        "codes that differ (of 100 000)",
        "of these first",
        "in images (%)",
        "in quantizers",
        "same class (%)",
        "margin of others (% of median)",
        "guided distance",
    )
    results = {}
    for family, (name, options) in MODELS.items():
        record = results[family] = measure(name, options, images, arguments.bits)
        margin = record["largest_margin"]
        table.add_row(
            family,
            name,
            f"{record['codes_per_100000']:.2f}",
            f"{record['first_codes_per_100000']:.2f}",
            f"{record['images_with_first']:.2f}",
            str(record["quantizers_with_first"]),
            f"{record['same_class']:.2f}",
            "" if margin is None else f"{margin:.1f}",
            f"{record['guided_distance']:.2f}",
        )
    Console(width=160).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
