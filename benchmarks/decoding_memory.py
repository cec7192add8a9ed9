"""Memory that decoding an image takes, in bytes a pixel, by file format: what qvit.images has to allow for.

Each file is decoded, and then prepared for a model, in a process of its own; counted is by how much its peak grows
(on Linux).

Example: python benchmarks/decoding_memory.py --side 6000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

MEASURE = """
import re, sys
from PIL import Image
from qvit.images import Picture, open_picture, suffixes
from qvit.runtime.preprocess import preprocess
def peak():
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
chosen = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "crop_mode": "center",
          "interpolation": "bicubic"}
suffixes()
preprocess(Image.new("P", (8, 8)), chosen)
before = peak()
picture = open_picture(sys.argv[1])
decoded = peak()
preprocess(picture, chosen)
pixels = picture.width * picture.height
print((decoded - before) / pixels, (peak() - before) / pixels)
"""


def files(folder: Path, side: int) -> Iterator[tuple[str, Path]]:
    """Write images of ``side`` x ``side`` pixels and yield what they are."""
    grey = Image.linear_gradient("L").resize((side, side))
    rgb = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    rgba = Image.merge("RGBA", (*rgb.split(), grey))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, suffix, options in (
        ("PNG, grey", grey, "png", {}),
        ("PNG, 1 bit", grey.convert("1"), "png", {}),
        ("PNG, 16 bits", deep, "png", {}),
        ("PNG, palette", rgb.convert("P"), "png", {}),
        ("PNG, RGB", rgb, "png", {}),
        ("PNG, RGBA", rgba, "png", {}),
        ("JPEG, grey", grey, "jpg", {}),
        ("JPEG, RGB", rgb, "jpg", {}),
        ("JPEG, RGB, turned", rgb, "jpg", {"exif": turned}),
        ("JPEG, RGB, progressive", rgb, "jpg", {"progressive": True, "subsampling": 0}),
        ("JPEG, CMYK, progressive", rgb.convert("CMYK"), "jpg", {"progressive": True}),
        ("WebP, RGB", rgb, "webp", {"method": 0}),
        ("WebP, RGBA", rgba, "webp", {"method": 0}),
        ("AVIF, RGBA", rgba, "avif", {"speed": 10, "quality": 30, "subsampling": "4:4:4"}),
        ("JPEG 2000, RGBA", rgba, "jp2", {}),
        ("TIFF, LZW", rgb, "tif", {"compression": "tiff_lzw"}),
        ("GIF", rgb, "gif", {}),
        ("BMP", rgb, "bmp", {}),
        ("QOI", rgb, "qoi", {}),
        ("DDS", rgb, "dds", {}),
    ):
        path = folder / f"image.{suffix}"
        image.save(path, **options)
        yield name, path


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=6000, help="pixels of an edge")
    arguments = parser.parse_args()
    table = Table("file", "decoded", "decoded and prepared", title="bytes a pixel at the peak")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files(Path(folder), arguments.side):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
            )
            table.add_row(name, *(f"{float(value):.1f}" for value in done.stdout.split()))
    Console().print(table)


if __name__ == "__main__":
    main()
