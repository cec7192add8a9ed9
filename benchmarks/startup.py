"""From the start of a process to its first prediction, and its peak memory: qvit predict, PyTorch and ONNX Runtime.

Each reads a DeiT with random weights and one JPEG file of 500 x 375 pixels, and prints the five most probable classes.
They take turns; files and bytecode are in the cache from a turn that does not count. The floor, which every Python
program on images stands on, is the import of NumPy and Pillow alone.

Example: python benchmarks/startup.py --json startup.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "deit_small_patch16_224"
THREADS = 2
FLOOR = "import numpy, PIL.Image"
PYTORCH = f"""
import sys
import timm, timm.data, torch
from PIL import Image
torch.set_num_threads({THREADS})
model = timm.create_model(sys.argv[1]).eval()
model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open(sys.argv[3]).convert("RGB"))[None])
print(logits.softmax(dim=-1).topk(5))
"""
ONNX_RUNTIME = f"""
import json, sys
import numpy as np, onnxruntime
from PIL import Image
from qvit.runtime.preprocess import preprocess
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {THREADS}
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
with open(sys.argv[2]) as file:
    image = preprocess(Image.open(sys.argv[3]), json.load(file))
logits = session.run(None, {{"images": image[None]}})[0][0]
shares = np.exp(logits - logits.max())
best = np.argsort(-shares)[:5]
print(best, shares[best] / shares.sum())
"""
# Whoever is measured writes its bytecode, as an installation by pip would have.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def prepare(folder: Path, name: str) -> None:
    """Write the image and the models: packed, as a PyTorch checkpoint and as an ONNX file."""
    import numpy as np
    import torch
    from PIL import Image

    from qvit.bench.peers import Case, export_onnx
    from qvit.models.from_program import float_model
    from random_models import preprocessing, program, write_random

    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(folder / "image.jpg")  # blurred: compressed about as a photo is
    write_random(folder / "model.safetensors", name, 4)
    torch.save(float_model(program(name)).state_dict(), folder / "model.pth")
    (folder / "preprocessing.json").write_text(json.dumps(preprocessing(224)))
    export_onnx(Case(program(name), 1, THREADS, folder / "model.onnx"))


def commands(folder: Path, name: str) -> dict[str, list[str]]:
    """Return the command of each contestant; the first is qvit's."""
    python, image = sys.executable, str(folder / "image.jpg")
    files = [str(folder / file) for file in ("model.safetensors", "model.pth", "model.onnx", "preprocessing.json")]
    return {
        "qvit predict, 4 bits": [
            str(Path(python).with_name("qvit")),
            "predict",
            files[0],
            image,
            "--threads",
            str(THREADS),
        ],
        "PyTorch, float32": [python, "-c", PYTORCH, name, files[1], image],
        "ONNX Runtime, float32": [python, "-c", ONNX_RUNTIME, files[2], files[3], image],
        "NumPy and Pillow alone": [python, "-c", FLOOR],
    }


def measure(command: list[str]) -> tuple[float, float]:
    """Return seconds from start to end of a process, and its peak resident memory in MB (10^6 bytes).

    Linux counts the memory of the process that starts it among its own peak: this one stays small, and imports what it
    needs for the tables afterwards.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"This command ended with status {process.returncode}: {' '.join(command)}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure, print a table and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="deit_tiny_patch16_224, deit_small_patch16_224, ...")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.model)
        return
    with tempfile.TemporaryDirectory(prefix="qvit-startup-") as folder:
        subprocess.run([sys.executable, __file__, "--prepare", folder, "--model", arguments.model], check=True)
        contestants = commands(Path(folder), arguments.model)
        runs: dict[str, list[tuple[float, float]]] = {title: [] for title in contestants}
        for number in range(arguments.rounds + 1):
            for title, command in contestants.items():
                result = measure(command)
                if number:
                    runs[title].append(result)

    from rich.console import Console
    from rich.table import Table

    from qvit.runtime.environment import machine

    medians = {
        title: [statistics.median(values) for values in zip(*pairs, strict=True)] for title, pairs in runs.items()
    }
    first = next(iter(medians.values()))
    packages = ("qvit", "torch", "timm", "onnxruntime", "numpy", "pillow")
    versions = {name: importlib.metadata.version(name) for name in packages}
    table = Table(
        title=f"{arguments.model}, {THREADS} threads, {machine()['cpu']}",
        caption=", ".join(map(" ".join, versions.items())),
    )
    for column in ("process", "s", "MB", "time, ratio", "memory, ratio"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for title, (seconds, megabytes) in medians.items():
        ratios = f"{seconds / first[0]:.2f}", f"{megabytes / first[1]:.2f}"
        table.add_row(title, f"{seconds:.3f}", f"{megabytes:.1f}", *ratios)
    Console().print(table)
    if arguments.json:
        results = {
            title: {"seconds": seconds, "megabytes": megabytes, "runs": runs[title]}
            for title, (seconds, megabytes) in medians.items()
        }
        content = {"model": arguments.model, "machine": machine(), "versions": versions, "results": results}
        arguments.json.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
