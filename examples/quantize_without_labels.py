"""Quantize your own ViT without labels: a float model and a folder of pictures in, a packed file out.

Examples:
  python examples/quantize_without_labels.py photos --model deit_small_patch16_224 --out model.safetensors
  python examples/quantize_without_labels.py photos --model vit_base_patch16_224 --weights mine.pth --classes 37
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import timm
import torch
from PIL import Image

import qvit


def main() -> None:
    """Quantize, reconstruct, export, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder with some hundred pictures of the kind the model will see")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name")
    parser.add_argument("--weights", type=Path, help="file of your own weights; timm's pretrained ones by default")
    parser.add_argument("--classes", type=int, help="how many, if not as many as the pretrained model has")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000, help="of reconstruction")
    parser.add_argument("--out", type=Path, default=Path("model.safetensors"))
    args = parser.parse_args()

    head = {} if args.classes is None else {"num_classes": args.classes}
    model = timm.create_model(args.model, pretrained=args.weights is None, checkpoint_path=args.weights, **head).eval()
    preprocessing = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**preprocessing)
    paths = [path for path in args.pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    random.Random(0).shuffle(paths)
    pictures = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    held_out, used = pictures[: len(pictures) // 5].split(32), pictures[len(pictures) // 5 :].split(32)

    student = qvit.quantize(model, qvit.QuantConfig(args.bits, args.bits))
    qvit.calibrate(student, used)
    print(f"calibrated: {qvit.agreement(student, model, held_out).sentence}")
    qvit.reconstruct(student, model, used, steps=args.steps)
    print(f"reconstructed: {qvit.agreement(student, model, held_out).sentence}")
    qvit.export(student, args.out, preprocessing=preprocessing, replace=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")

    engine = qvit.load(args.out)  # needs no PyTorch
    print(f"{paths[0]}: {engine.predict(paths[0], top_k=3)}")


if __name__ == "__main__":
    main()
