"""Quantization-aware training in a plain PyTorch loop: few bits, guided by the float model (Q-ViT).

Example:
  python examples/train.py --bits 2 --epochs 20 --out digits.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm.optim
import torch

import qvit
from digits import CLASSES, PREPROCESSING, float_model, loaders, top1


def main() -> None:
    """Train on the digits, keep a checkpoint, export, and run the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--float-epochs", type=int, default=30, help="of the float model, which is also the teacher")
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(0)
    train, val = loaders()
    teacher = float_model(train, args.float_epochs)
    print(f"float: top-1 {top1(teacher, val):.2f} %")

    student = qvit.quantize(teacher, qvit.QuantConfig(args.bits, args.bits))
    qvit.calibrate(student, train)
    print(f"{args.bits} bits, calibrated: top-1 {top1(student.eval(), val):.2f} %")

    loss_fn = qvit.DistillationLoss(teacher)  # labels, the teacher's classes, and its queries and keys
    optimizer = timm.optim.create_optimizer_v2(student, "lamb", lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    for epoch in range(args.epochs):
        student.train()
        for images, labels in train:
            loss = loss_fn(student, images, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, top-1 {top1(student.eval(), val):.2f} %")

    checkpoint = args.out.with_suffix(".pt")  # for qvit eval, analyze, compare, or to train on from
    qvit.save_checkpoint(student, checkpoint, preprocessing=PREPROCESSING, classes=CLASSES, replace=True)
    qvit.export(student, args.out, preprocessing=PREPROCESSING, classes=CLASSES, replace=True)
    engine = qvit.load(args.out)
    in_engine = top1(lambda images: torch.from_numpy(engine(images.numpy())), val)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, top-1 in the engine {in_engine:.2f} %")


if __name__ == "__main__":
    main()
