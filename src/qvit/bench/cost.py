"""What a multiply-add of each width costs the engine on this machine, and what a model should take by that.

There is :mod:`qvit.search.timing` too: that tells products of one width from each other and for that times dozens of
models of the very program, where here one model of two blocks for each width serves programs of any size.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np
import timm
import torch

from qvit.bench.compare import interleaved, time_once
from qvit.bench.random_model import random_model
from qvit.config import Bits, QuantConfig
from qvit.format.program import Program
from qvit.models.families import lower
from qvit.quantization.convert import quantize
from qvit.runtime.engine import Engine

ROUNDS = 20
HOW = "DeiT-S with two of its blocks and average pooling, all of the same widths, one image on one thread"
"""What is timed."""
_MODEL, _BLOCKS, _SIDE = "deit_small_patch16_224", 2, 224


def seconds_per_mac(widths: Collection[Bits]) -> dict[Bits, float]:
    """Return the engine's seconds of a multiply-add, by the bits of its factors, on one thread.

    For each pair of widths a small model is timed as a whole, by its multiply-adds: norms, softmax and quantization
    are in the figure, in the proportion that this model has of them (:data:`HOW`). The fastest of some rounds counts,
    the one that was disturbed least.
    """
    programs = {bits: _program(bits) for bits in widths}
    image = np.random.default_rng(0).standard_normal((1, 3, _SIDE, _SIDE), np.float32)
    timers = {
        bits: functools.partial(time_once, Engine(random_model(program), threads=1), image)
        for bits, program in programs.items()
    }
    return {
        bits: min(seconds) / sum(programs[bits].macs().values())
        for bits, seconds in interleaved(timers, ROUNDS).items()
    }


def predicted_seconds(program: Program, costs: dict[Bits, float]) -> float:
    """Return what one image should take by the cost of each multiply-add (:func:`seconds_per_mac`)."""
    return sum(count * costs[bits] for bits, count in program.macs().items())


def _program(bits: Bits) -> Program:
    with torch.device("meta"):
        # With a class token the engine would leave out what of the last block nobody looks at: half of two.
        model = timm.create_model(_MODEL, depth=_BLOCKS, global_pool="avg")
    config = QuantConfig(rectifier=None, overrides={"*": (bits.weight, bits.activation)})
    return lower(quantize(model, config), (_SIDE, _SIDE))[0]
