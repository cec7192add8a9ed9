"""What the training examples share: handwritten digits, and a small float ViT that learns them in half a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = [str(digit) for digit in range(10)]
PREPROCESSING = {
    "input_size": (1, 8, 8),
    "mean": (0.5,),
    "std": (0.5,),
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bilinear",
}
"""How a picture becomes what the model was trained on; goes into the packed file."""


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Return batches of images ``(B, 1, 8, 8)`` and labels to train on, and others to measure on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(images)) % 5 == 0
    train, val = (TensorDataset(images[chosen], labels[chosen]) for chosen in (~held_out, held_out))
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(val, batch_size)


def float_model(train: DataLoader, epochs: int = 30) -> nn.Module:
    """Return timm's ViT in the size of the digits, trained for some epochs."""
    shape: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(CLASSES), **shape)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * len(train))
    for _ in range(epochs):
        for images, labels in train:
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def top1(predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the percentage of images to whose class ``predict`` gives the largest logit."""
    right = [predict(images).argmax(dim=1) == labels for images, labels in batches]
    return 100 * torch.cat(right).float().mean().item()
