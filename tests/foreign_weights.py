"""Small float models, and their weights in files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from qvit.errors import QvitError
from qvit.models.float_models import load_float
from qvit.models.spec import ModelSpec, describe

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
EXPECTED = describe(VIT, ARGS, ["a", "b", "c"], {})
"""Of the model that the weights are wanted for."""


def trained(name: str = VIT, **changes: Any) -> nn.Module:
    """Return a small float model whose weights are of the size that trained ones have."""
    model = timm.create_model(name, num_classes=3, **{**(SWIN if "swin" in name else ARGS), **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def load(path: Path, spec: ModelSpec) -> tuple[Any, list[str]]:
    said: list[str] = []
    model, _ = load_float(path, spec, said.append)
    return model, said


def refusal(path: Path, spec: ModelSpec) -> str:
    """Return the sentence in which a file is refused: one line, short, and no escape sequence."""
    with pytest.raises(QvitError) as caught:
        load_float(path, spec, print)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    assert "torch.load" not in text
    assert "weights_only" not in text
    return text
