"""What a user does with an installed wheel: ``python tests/installed.py`` where nothing else is installed.

Every golden file, and a block of DeiT-T's size at 2, 3, 4 and 8 bits, runs on every instruction set, each code held
against the reference; one file is given pictures, in Python and on the command line. Ends with a line that says where
that was, or with what is wrong. ``make test-wheel`` and ``make test-aarch64`` call it, and cibuildwheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import platform
import sys
import tempfile
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import qvit
from following import check_codes
from golden import GOLDEN, check_logits, images_of
from packed_models import make_packed
from qvit import _kernels
from qvit.cli import app
from qvit.exporting.web_site import write_site
from qvit.format.packed import read_packed
from qvit.runtime.engine import instruction_sets

CLASSIFIER = GOLDEN / "vit.safetensors"
DEIT = {"image_size": (64, 64), "patch_size": (16, 16), "embed_dim": 192, "num_heads": 3, "head_dim": 64, "depth": 1}


def check_models() -> int:
    """Run every model on every instruction set with one thread and with two; return how many models there are."""
    golden = {path.stem: read_packed(path) for path in GOLDEN.glob("*.safetensors")}
    large = {f"{bits} bits": make_packed(bits, **DEIT) for bits in (2, 3, 4, 8)}
    for (name, packed), isa, threads in product((golden | large).items(), instruction_sets(), (1, 2)):
        engine = qvit.Engine(packed, threads=threads, instruction_set=isa)
        logits = check_codes(packed, engine, images_of(packed.program))
        if name in golden:
            check_logits(name, logits)
    return len(golden | large)


def check_pictures() -> None:
    """Classify a picture in Python, as an array and as a file, and on the command line."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    (((name, probability), *_),) = qvit.load(CLASSIFIER).predict(pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.fromarray(pixels).save(path)
        assert qvit.load(CLASSIFIER).predict(path)[0][0] == (name, probability)
        printed = io.StringIO()
        arguments = ["qvit", "predict", str(CLASSIFIER), str(path), "--json"]
        # In this process: an emulator does not start others of its kind.
        written, ended = contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit)
        with mock.patch.object(sys, "argv", arguments), written, ended:
            app.main()
    assert name in printed.getvalue(), printed.getvalue()
    json.loads(printed.getvalue())


def check_site() -> None:
    """Write a site for the browser, whose engine is in the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        write_site(CLASSIFIER, Path(folder) / "site")


def main() -> None:
    assert importlib.util.find_spec("torch") is None, "this is no bare environment: it has PyTorch"
    assert Path(qvit.__file__).parent == Path(str(_kernels.__file__)).parent, "this is no installed wheel"
    files = check_models()
    check_pictures()
    check_site()
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    print(f"qvit {qvit.__version__} on {where}: {files} models on {', '.join(instruction_sets())}")


if __name__ == "__main__":
    main()
