"""Lay out CIFAR-10's training images as train/ and val/ with the split that docs/cifar10.md uses.

Input: a folder ``train/<class>/<0000..4999>.jpg`` (or an archive of one), the 50,000 training images in their original
order. Images 4500 to 4999 of each class become validation.

Example: python benchmarks/cifar10_folders.py cifar10-train.tar.xz cifar10
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

FIRST_VALIDATION = 4500


def main() -> None:
    """Copy the images into their two folders and print how many went where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder or archive")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        source = arguments.source
        if source.is_file():
            shutil.unpack_archive(source, unpacked, filter="data")
            source = Path(unpacked)
        counts = {"train": 0, "val": 0}
        for image in sorted(source.glob("train/*/*.jpg")):
            split = "val" if int(image.stem) >= FIRST_VALIDATION else "train"
            folder = arguments.target / split / image.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, folder / image.name)
            counts[split] += 1
    print(f"{counts['train']} training and {counts['val']} validation images in {arguments.target}")


if __name__ == "__main__":
    main()
