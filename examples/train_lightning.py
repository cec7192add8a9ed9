"""Quantization-aware training with Lightning: the student and its loss are a module like any other.

Example:
  pip install '.[train,examples]'
  python examples/train_lightning.py --bits 2 --epochs 20 --out digits.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import timm.optim
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

import qvit
from digits import CLASSES, PREPROCESSING, float_model, loaders, top1

Batch = tuple[Tensor, Tensor]


class Training(lightning.LightningModule):
    """A calibrated student that learns from labels and from its teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.loss_fn = student, qvit.DistillationLoss(teacher)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss_fn(self.student, *batch)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Note the accuracy of a batch down."""
        self.log("top-1 (%)", top1(self.student, [batch]), prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the student alone, and a rate that falls along a cosine."""
        optimizer = timm.optim.create_optimizer_v2(self.student, "lamb", lr=2e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train on the digits, keep a checkpoint, and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--float-epochs", type=int, default=30, help="of the float model, which is also the teacher")
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"))
    args = parser.parse_args()

    lightning.seed_everything(0)
    train, val = loaders()
    teacher = float_model(train, args.float_epochs)
    student = qvit.quantize(teacher, qvit.QuantConfig(args.bits, args.bits))
    qvit.calibrate(student, train)

    trainer = lightning.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(Training(student, teacher), train, val)

    student, checkpoint = student.cpu(), args.out.with_suffix(".pt")
    qvit.save_checkpoint(student, checkpoint, preprocessing=PREPROCESSING, classes=CLASSES, replace=True)
    qvit.export(student, args.out, preprocessing=PREPROCESSING, classes=CLASSES, replace=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, top-1 {top1(student.eval(), val):.2f} %")


if __name__ == "__main__":
    main()
