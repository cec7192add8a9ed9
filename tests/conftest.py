"""Small models, the same on every run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import qvit

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


def make_vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    """Return a tiny float model in evaluation mode whose attention is not flat and whose biases are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **kwargs})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("qkv.weight"):
                parameter.normal_(std=0.35)
            elif parameter.ndim >= 2 and "embed" not in key and "token" not in key:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "embed" in key or "token" in key:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vit() -> nn.Module:
    return make_vit()


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    return make_vit


@pytest.fixture(scope="session")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed file of :func:`make_vit`, 4 bits; classes are called ``class 0`` to ``class 9``."""
    model = qvit.quantize(make_vit(), qvit.QuantConfig(4))
    qvit.calibrate(model, [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))])
    path = tmp_path_factory.mktemp("packed") / "tiny.safetensors"
    preprocessing = {
        "input_size": [3, 16, 16],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    qvit.export(model, path, preprocessing=preprocessing, classes=[f"class {n}" for n in range(10)])
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(10, (16,), generator=torch.Generator().manual_seed(2))
