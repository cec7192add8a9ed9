"""Memory is bounded whatever the image: small files of many pixels, and strips, under a limit of the address space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")

SIDE = 5000
LIMITED = """
import os, resource, sys
import numpy as np
from PIL import Image
def allow(extra):
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(float(extra)), resource.RLIM_INFINITY))
"""


def run(code: str, *arguments: str | Path) -> None:
    """Run Python in a process with one thread, whose memory ``allow(bytes)`` limits from then on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def image_file(folder: Path, mode: str, size: tuple[int, int]) -> Path:
    image = Image.fromarray(np.zeros(size[::-1], np.uint16)) if mode == "I;16" else Image.new(mode, size)
    path = folder / f"{mode.replace(';', '')}-{size[0]}x{size[1]}.png"
    image.save(path, compress_level=1)
    return path


@pytest.mark.parametrize(
    ("mode", "most"),
    # Bytes a pixel: as it is stored, and one of grey or four of RGB if it has to be converted. Before, 8 to 21.
    [("L", 1), ("1", 2), ("I;16", 3), ("P", 5), ("RGB", 4), ("LA", 8)],
)
def test_predict_takes_little_more_than_the_decoded_image(
    tmp_path: Path, packed_file: Path, mode: str, most: int
) -> None:
    code = """
from qvit.runtime.engine import load
model, image, most = sys.argv[1:]
engine = load(model, threads=1)
engine.predict([np.zeros((9, 9, 3), np.uint8), Image.new("P", (9, 9))])
allow(most)
engine.predict(image)
"""
    run(code, packed_file, image_file(tmp_path, mode, (SIDE, SIDE)), most * SIDE**2 + 48e6)


STRIPS = [(1, 60_000), (60_000, 1), (2, 2_000_000), (2_000_000, 2)]


def test_strips_take_no_more_than_other_images(tmp_path: Path) -> None:
    code = """
from qvit.images import open_picture
from qvit.runtime.preprocess import preprocess
chosen = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
preprocess(Image.new("P", (9, 9)), {**chosen, "crop_mode": "center"})
allow(160e6)
for path in sys.argv[1:]:
    for mode in ("center", "squash", "border"):
        preprocess(path, {**chosen, "crop_mode": mode})
"""
    run(code, *(image_file(tmp_path, mode, size) for size in STRIPS for mode in ("RGB", "P")))


def test_a_list_of_images_is_decoded_one_at_a_time(tmp_path: Path, packed_file: Path) -> None:
    code = """
from qvit.runtime.engine import load
model, image = sys.argv[1:]
engine = load(model, threads=1)
engine.predict(Image.new("P", (9, 9)))
allow(64e6)
engine.predict([image] * 8)
"""
    run(code, packed_file, image_file(tmp_path, "RGB", (3000, 3000)))
