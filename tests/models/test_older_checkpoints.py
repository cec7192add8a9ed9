"""Checkpoints that earlier versions wrote go on working.

``fixtures/checkpoint-version-1.pt`` was written by the code of before version 2, of a student with random weights, head
statistics, other bits for one layer and an override that matches nothing; the JSON file holds the logits and the
checksum that the same code gave.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import qvit
from qvit.exporting.packed import export_checkpoint
from qvit.models.checkpoint import VERSION, load_checkpoint, weights_checksum, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD = FIXTURES / "checkpoint-version-1.pt"


@pytest.fixture
def expected() -> dict[str, object]:
    return json.loads(OLD.with_suffix(".json").read_text())


@pytest.fixture
def images() -> Tensor:
    return torch.linspace(-2, 2, 4 * 64).sin().mul(3).reshape(4, 1, 8, 8)


def test_version_1_gives_its_logits_and_its_checksum(expected, images: Tensor) -> None:
    assert torch.load(OLD, weights_only=True)["version"] == 1 < VERSION
    model, spec = load_checkpoint(OLD)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)
    assert weights_checksum(model) == expected["sha256"]
    assert spec.quant_config["overrides"] == {"blocks.0.mlp.fc2": [2, 5], "blocks.7.*": [8, 8]}


def test_version_1_goes_through_the_chain(tmp_path: Path, expected, images: Tensor) -> None:
    model, spec = load_checkpoint(OLD)
    write_checkpoint(tmp_path / "new.pt", spec, model)
    again, _ = load_checkpoint(tmp_path / "new.pt")
    assert weights_checksum(again) == expected["sha256"]
    assert torch.load(tmp_path / "new.pt", weights_only=True)["version"] == VERSION
    export_checkpoint(OLD, tmp_path / "model.safetensors")
    logits = qvit.load(tmp_path / "model.safetensors")(images.numpy())
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-3, atol=1e-3)
