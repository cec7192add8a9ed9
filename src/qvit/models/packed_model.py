"""A packed file where the training wing expects a model: the engine measured by the code that measures checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qvit.models.checkpoint import load_checkpoint
from qvit.models.spec import ModelSpec
from qvit.runtime.engine import Engine, load


class PackedClassifier(nn.Module):
    """The engine as a module without parameters; it always runs on the CPU.

    Args:
        engine: what :func:`qvit.load` returned.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of preprocessed images ``(B, C, H, W)``, float32, on the images' device."""
        return torch.from_numpy(self.engine(images.cpu().numpy())).to(images.device)


def load_packed(path: str | Path) -> tuple[PackedClassifier, ModelSpec]:
    """Return the engine of a packed file as a module, and a spec for it, with the bits that most layers have.

    Raises:
        PackedFileError: as :func:`qvit.format.packed.read_packed`.
    """
    engine = load(path)
    weight, activation = engine.program.usual_bits()
    bits = {"weight_bits": weight, "activation_bits": activation}
    return PackedClassifier(engine), ModelSpec(
        engine.program.name, {}, engine.classes, engine.preprocessing, bits, method="packed"
    )


def load_model(path: Path) -> tuple[nn.Module, ModelSpec]:
    """Return the model of a checkpoint, or the engine of a packed file (``.safetensors``) as a module, and its spec.

    Raises:
        CheckpointError: as :func:`qvit.models.checkpoint.load_checkpoint`.
        PackedFileError: as :func:`load_packed`.
    """
    return load_packed(path) if path.suffix == ".safetensors" else load_checkpoint(path)
