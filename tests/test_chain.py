"""A model by its name, from a file of weights to the engine: what one part of the chain takes, all of it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import qvit
from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.exporting.packed import export_checkpoint
from qvit.models.checkpoint import load_checkpoint, write_checkpoint
from qvit.models.float_models import load_float
from qvit.models.spec import describe

SMALL: dict[str, Any] = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLASSES = ["a", "b", "c"]


@pytest.mark.parametrize("name", ["aimv2_large_patch14_224", "vit_medium_patch16_rope_reg1_gap_256"])
def test_model_goes_from_its_weights_to_the_engine(tmp_path: Path, name: str) -> None:
    spec = describe(name, SMALL, CLASSES, {})
    model = timm.create_model(name, num_classes=3, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    teacher, spec = load_float(tmp_path / "weights.pth", spec, print)

    images, labels = torch.randn(8, 3, 28, 28), torch.randint(3, (8,))
    student = quantize(teacher, QuantConfig(8, 8))
    calibrate(student, [images])
    optimizer = timm.optim.create_optimizer_v2(student, opt="sgd", lr=1e-3, weight_decay=0.05)
    DistillationLoss(teacher)(student, images, labels).backward()
    optimizer.step()
    spec = dataclasses.replace(spec, quant_config=QuantConfig(8, 8).to_dict())
    write_checkpoint(tmp_path / "best.pt", spec, student)

    loaded, _ = load_checkpoint(tmp_path / "best.pt")
    export_checkpoint(tmp_path / "best.pt", tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = loaded(images)
        logits = torch.from_numpy(qvit.load(tmp_path / "model.safetensors")(images.numpy()))
        torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
        assert (expected - teacher(images)).norm() < 0.3 * teacher(images).norm()
