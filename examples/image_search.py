"""Find the pictures of a folder that look like one, by 4-bit vectors of DINOv2, CLIP, SigLIP or another timm model.

Examples:
  python examples/image_search.py photos cat.jpg --model vit_small_patch14_dinov2.lvd142m
  python examples/image_search.py photos cat.jpg --model vit_base_patch16_clip_224.openai
  python examples/image_search.py photos cat.jpg --model vit_base_patch16_siglip_224.webli

The model is quantized on the pictures themselves the first time; its packed file and their vectors are kept in --index.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import qvit


def quantize(name: str, weights: Path | None, pictures: list[Path], bits: int, steps: int, file: Path) -> None:
    """Write timm's model ``name``, without its classifier, as a packed file that gives vectors."""
    import timm  # needed only this once, as PyTorch is
    import torch
    from PIL import Image

    model = timm.create_model(name, pretrained=weights is None, checkpoint_path=weights, num_classes=0).eval()
    preprocessing = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**preprocessing)
    batches = torch.stack([transform(Image.open(path).convert("RGB")) for path in pictures]).split(16)
    student = qvit.quantize(model, qvit.QuantConfig(bits, bits))
    qvit.calibrate(student, batches)
    qvit.reconstruct(student, model, batches, steps=steps)
    print(f"{name}, {bits} bits: {qvit.agreement(student, model, batches).sentence}")
    qvit.export(student, file, preprocessing=preprocessing, replace=True)  # of an index that was cut off


def vectors(engine: qvit.Engine, pictures: list[Path]) -> np.ndarray:
    """Return the vectors ``(pictures, width)`` of pictures, of length 1, some pictures at a time."""
    found = np.concatenate([engine.embed(pictures[at : at + 16]) for at in range(0, len(pictures), 16)])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def main() -> None:
    """Make the index if it is not there, and search it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder to search")
    parser.add_argument("query", type=Path, help="picture to look for")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m", help="timm's name")
    parser.add_argument("--weights", type=Path, help="file of weights; timm's pretrained ones by default")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500, help="of reconstruction")
    parser.add_argument("--index", type=Path, default=Path("index"), help="folder of the packed file and the vectors")
    parser.add_argument("--count", type=int, default=5, help="of pictures that are shown")
    args = parser.parse_args()

    file, index = args.index / "model.safetensors", args.index / "vectors.npz"
    if not index.exists():
        args.index.mkdir(parents=True, exist_ok=True)
        pictures = sorted(p for p in args.pictures.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        quantize(args.model, args.weights, pictures[:: len(pictures) // 512 + 1], args.bits, args.steps, file)
        names = [str(path) for path in pictures]
        np.savez(index, names=names, vectors=vectors(qvit.load(file), pictures), model=args.model)
    known = np.load(index)
    if known["model"] != args.model:
        parser.error(f"{args.index} holds vectors of {known['model']}: give another --index for {args.model}")
    cosines = known["vectors"] @ vectors(qvit.load(file), [args.query])[0]
    for place in np.argsort(-cosines)[: args.count]:
        print(f"{cosines[place]:.3f}  {known['names'][place]}")


if __name__ == "__main__":
    main()
