"""What a user does with an installed wheel: ``python tests/installed.py`` where nothing else is installed.

Every golden file runs on every instruction set, each code held against the reference; one file is given pictures, in
Python and on the command line. Ends with a line that says where that was, or with what is wrong. ``make test-wheel``
and ``make test-aarch64`` call it, and cibuildwheel.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import qvit
from following import check_codes
from golden import GOLDEN, check_logits, images_of
from qvit import _kernels
from qvit.format.packed import read_packed
from qvit.runtime.engine import instruction_sets

CLASSIFIER = GOLDEN / "vit.safetensors"


def check_models() -> int:
    """Run every golden file on every instruction set with one thread and with two; return how many files there are."""
    files = sorted(GOLDEN.glob("*.safetensors"))
    for path in files:
        for name in instruction_sets():
            for threads in (1, 2):
                engine = qvit.load(path, threads=threads, instruction_set=name)
                check_logits(path.stem, check_codes(read_packed(path), engine, images_of(engine.program)))
    return len(files)


def check_pictures() -> None:
    """Classify a picture in Python, as an array and as a file, and on the command line."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    (((name, probability), *_),) = qvit.load(CLASSIFIER).predict(pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.fromarray(pixels).save(path)
        assert qvit.load(CLASSIFIER).predict(path)[0][0] == (name, probability)
        command = [sys.executable, "-m", "qvit.cli", "predict", str(CLASSIFIER), str(path), "--json"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert name in printed, printed
    json.loads(printed)


def main() -> None:
    assert importlib.util.find_spec("torch") is None, "this is no bare environment: it has PyTorch"
    assert "site-packages" in str(_kernels.__file__), f"this is no installed wheel: {_kernels.__file__}"
    files = check_models()
    check_pictures()
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    print(f"qvit {qvit.__version__} on {where}: {files} models on {', '.join(instruction_sets())}")


if __name__ == "__main__":
    main()
