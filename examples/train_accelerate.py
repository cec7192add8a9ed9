"""Quantization-aware training on several GPUs, or processes of the CPU, with Accelerate; what differs from train.py.

Example:
  torchrun --nproc-per-node 2 examples/train_accelerate.py --bits 2 --epochs 20 --out digits.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import qvit
from digits import CLASSES, PREPROCESSING, float_model, loaders, top1


def main() -> None:
    """Train on the digits in all processes together; the first one keeps what they made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--float-epochs", type=int, default=30, help="of the float model, which is also the teacher")
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"))
    args = parser.parse_args()

    # Where there is no GPU, the processes are joined on the CPU. They divide each batch, which so stays as large.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), split_batches=True)
    set_seed(0)
    train, val = loaders()
    teacher = float_model(train, args.float_epochs)  # the same in every process, from the same seed
    student = qvit.quantize(teacher, qvit.QuantConfig(args.bits, args.bits))
    qvit.calibrate(student, train)

    loss_fn = qvit.DistillationLoss(teacher.to(accelerator.device))
    optimizer = timm.optim.create_optimizer_v2(student, "lamb", lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    student, optimizer, train, val, schedule = accelerator.prepare(student, optimizer, train, val, schedule)
    for epoch in range(args.epochs):
        student.train()
        for images, labels in train:
            loss = loss_fn(student, images, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        accuracy = accelerator.reduce(torch.tensor(top1(student.eval(), val)), "mean")
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, top-1 {accuracy:.2f} %")

    if accelerator.is_main_process:
        student = accelerator.unwrap_model(student).cpu()
        checkpoint = args.out.with_suffix(".pt")
        qvit.save_checkpoint(student, checkpoint, preprocessing=PREPROCESSING, classes=CLASSES, replace=True)
        qvit.export(student, args.out, preprocessing=PREPROCESSING, classes=CLASSES, replace=True)
        print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, trained by {accelerator.num_processes} processes")
    accelerator.end_training()


if __name__ == "__main__":
    main()
