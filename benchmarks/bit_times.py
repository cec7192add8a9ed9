"""The time of a model as the sum of what its products take at their bits, beside the time of the whole model.

Random weights, for time does not depend on them. What the products take is measured as qvit search-bits does; the
models are those of one number of bits, and some with random bits for every product.

Example: python benchmarks/bit_times.py deit_small_patch16_224 --threads 1
"""

from __future__ import annotations

import argparse
import random

import timm
import torch
from rich.console import Console
from rich.table import Table

from qvit import QuantConfig, quantize
from qvit.config import Bits
from qvit.models.families import image_size_of, lower
from qvit.search.find import UNIFORM
from qvit.search.products import CANDIDATES, free_products
from qvit.search.timing import Stopwatch


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--random", type=int, default=8, help="how many models of random bits")
    arguments = parser.parse_args()
    with torch.device("meta"):
        student = quantize(timm.create_model(arguments.model), QuantConfig(rectifier=None))
    program, _ = lower(student, image_size_of(student))
    products = free_products(student, program)
    stopwatch = Stopwatch(program, products, arguments.threads)
    times = stopwatch.times(lambda done, todo: None)
    models = {f"{bits} bits": {product.name: Bits(bits, bits) for product in products} for bits in UNIFORM}
    for seed in range(arguments.random):
        rng = random.Random(seed)
        models[f"random bits, seed {seed}"] = {product.name: rng.choice(CANDIDATES) for product in products}
    engine = f"{times.threads} threads, {times.instruction_set}"
    table = Table(title=f"{arguments.model}, one image, {engine}")
    for number, name in enumerate(("model", "summed (ms)", "timed (ms)", "difference (%)")):
        table.add_column(name, justify="right" if number else "left")
    for title, bits in models.items():
        summed, timed = times.whole(bits), stopwatch.measure(bits)
        table.add_row(title, f"{summed:.2f}", f"{timed:.2f}", f"{100 * (summed / timed - 1):+.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
