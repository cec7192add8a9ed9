"""Time and peak memory of the guided distance against the number of tokens: the d x d form beside the N x N definition.

Each measurement is a process of its own (forward and backward, float32, head dimension 64); memory is what its peak
resident size grew by after the inputs were there.

Example: python benchmarks/guided_distillation.py --json guided.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qvit.quantization.distill import guided_distance

TOKENS = (197, 785)
BATCH, HEADS, HEAD_DIM = 8, 12, 64
RUNS = 7


def by_definition(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the distance with the N x N matrices of the definition built."""
    gram_t, gram = (x @ x.transpose(-2, -1) for x in (teacher, student))
    normed_t, normed = (g / torch.linalg.matrix_norm(g)[..., None, None] for g in (gram_t, gram))
    return torch.linalg.matrix_norm(normed_t - normed)


FORMS = {"d x d": guided_distance, "N x N": by_definition}


def measure(form: str, tokens: int) -> dict[str, Any]:
    """Return seconds (median) and megabytes of one form at one number of tokens."""
    torch.manual_seed(0)
    teacher = torch.randn(BATCH, HEADS, tokens, HEAD_DIM)
    student = torch.randn(BATCH, HEADS, tokens, HEAD_DIM, requires_grad=True)
    FORMS[form](teacher[:1, :1, :4], student[:1, :1, :4]).mean().backward()  # libraries loaded, gradient there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        FORMS[form](teacher, student).mean().backward()
        seconds.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"form": form, "tokens": tokens, "seconds": statistics.median(seconds), "megabytes": grown * 1024 / 1e6}


def main() -> None:
    """Measure, print a table and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = []
    for form in FORMS:
        for tokens in TOKENS:
            with context.Pool(1) as pool:
                results.append(pool.apply(measure, (form, tokens)))
    table = Table(
        title=f"Guided distance, batch {BATCH}, {HEADS} heads, PyTorch {torch.__version__}, Linux peak memory"
    )
    for column in ("form", "tokens", "ms", "MB", "ms, ratio to 197", "MB, ratio to 197"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for result in results:
        base = next(r for r in results if r["form"] == result["form"] and r["tokens"] == TOKENS[0])
        table.add_row(
            result["form"],
            str(result["tokens"]),
            f"{1e3 * result['seconds']:.1f}",
            f"{result['megabytes']:.1f}",
            f"{result['seconds'] / base['seconds']:.2f}",
            f"{result['megabytes'] / max(base['megabytes'], 1e-9):.2f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": sys.version, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
