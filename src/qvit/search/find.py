"""The bits that a budget is best spent on, and what models of other bits come to beside them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from qvit.analysis.agreement import Agreement, agreement
from qvit.config import EDGE_BITS, Bits, QuantConfig, check_number
from qvit.errors import ConfigError, DataError
from qvit.models.families import image_size_of, lower
from qvit.quantization.calibrate import scales_by_bits
from qvit.quantization.convert import check_values, quantize
from qvit.quantization.images import images_of
from qvit.search.cost import UNITS, Cost, counted_costs, time_cost
from qvit.search.products import CANDIDATES, WIDTHS, FreeProduct, free_products
from qvit.search.sensitivity import Distances, Rescaled, outputs_of, sensitivities
from qvit.search.solve import Numbers, UnmetError, choose, total
from qvit.search.timing import Stopwatch

UNIFORM = (2, 3, 4, 8)
"""Bits of the models, alike in everything, that are measured beside what is found."""
_FRONTIER = 8
"""Budgets of a frontier."""
Report = Callable[[str, int, int], None]
"""Told what is measured, how many of how many of it are done."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of some bits.

    Args:
        title: for people.
        bits: of every free product, by its name.
        costs: by the end of a budget's option, in its unit.
        predicted: distance of the outputs as the sum over the quantizers, each measured alone.
        distance: measured of the model, calibrated alone (:func:`qvit.quantization.outputs.output_distance`).
        agreement: with the float model, calibrated alone.
        measured_ms: of the whole model in the engine, where that was measured.
    """

    title: str
    bits: dict[str, Bits]
    costs: dict[str, float]
    predicted: float
    distance: float
    agreement: Agreement
    measured_ms: float | None


@dataclasses.dataclass(frozen=True)
class Found:
    """What :func:`search_bits` returns.

    Args:
        overrides: of :class:`qvit.QuantConfig`, bits of weights and activations by the name of each layer and operand.
        model: the one that was found.
        uniform: models of one number of bits.
        frontiers: what is found for smaller and larger budgets, by the end of the option, each budget alone.
        sensitivities: distance of the outputs with one quantizer alone at some bits.
        threads: of the engine that was timed.
        instruction_set: of the engine that was timed.
    """

    overrides: dict[str, tuple[int, int]]
    model: Model
    uniform: list[Model]
    frontiers: dict[str, list[Model]]
    sensitivities: Distances
    threads: int
    instruction_set: str


def search_bits(
    teacher: nn.Module,
    batches: Iterable[Any],
    budgets: Mapping[str, float],
    *,
    held_out: Sequence[Tensor] | None = None,
    threads: int | None = None,
    report: Report | None = None,
) -> Found:
    """Return the bits of each layer, of weights and activations, and of each operand of attention that a budget allows.

    They are those of the least sum of distances of the outputs, each measured with one quantizer alone at these bits
    (docs/method.md, section 11). The patch embedding and the heads keep 8 bits.

    Args:
        teacher: a float model of a family that qvit knows.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one, for the scales.
        budgets: all of which hold: ``"ms"``, milliseconds of one image in the engine on this machine; ``"mb"``, 10^6
            bytes of the packed file's tensors; ``"bops"``, 10^9 bit operations of one image, where a multiply-add is as
            many as the product of its factors' bits.
        held_out: images to measure distances on; ``batches`` by default.
        threads: of the engine; as many as this process may use by default.
        report: called as it goes on.

    Raises:
        ConfigError: without a budget, or for one that nothing keeps; it says the least that something does; for one of
            time where what was measured cannot be.
        UnsupportedModelError: as :func:`qvit.quantize`.
        DataError: if there are no images, or one makes a NaN or an infinity, naming the layer.
    """
    check_budgets(budgets)
    check_values(teacher)
    parameter = next(teacher.parameters())
    batches = [images_of(batch) for batch in batches]
    images = [images_of(batch).to(parameter) for batch in (batches if held_out is None else held_out)]
    if not sum(map(len, images)):
        raise DataError("The search needs at least one image to measure distances on, and there was none.")
    tell = report or (lambda what, done, todo: None)
    student = quantize(teacher, QuantConfig(EDGE_BITS, EDGE_BITS, rectifier=None))
    program, _ = lower(student, image_size_of(student))
    products = free_products(student, program)
    stopwatch = Stopwatch(program, products, threads)
    costs = counted_costs(program, products)
    nothing = [[0.0] * len(CANDIDATES) for _ in products]
    # What nothing keeps is refused before what takes long.
    _chosen(nothing, costs, {name: limit for name, limit in budgets.items() if name in costs})
    costs["ms"] = time_cost(products, stopwatch.times(lambda done, todo: tell("time of products", done, todo)))
    if "ms" in budgets and not costs["ms"].fixed + sum(map(min, costs["ms"].by_candidate)) > 0:
        raise ConfigError(
            "By what was measured some bits would take no time at all, so no --budget-ms means anything: this machine "
            "does too much else at present, or the model is too small to be timed."
        )
    _chosen(nothing, costs, budgets)

    scales = scales_by_bits(student, batches, WIDTHS, report=lambda done, todo: tell("calibration", done, todo))
    model = Rescaled(student, scales)
    model.set({})
    agreement(student, teacher, images)  # names the first block that gives a NaN or an infinity
    names = list(dict.fromkeys(name for product in products for name in (product.inputs, *product.weights)))
    distances = sensitivities(model, images, names, WIDTHS, lambda done, todo: tell("sensitivity", done, todo))
    values = [[_distance(product, bits, distances) for bits in CANDIDATES] for product in products]

    chosen = {"found": _chosen(values, costs, budgets)}
    chosen |= {f"{bits} bits": [CANDIDATES.index(Bits(bits, bits))] * len(products) for bits in UNIFORM}
    frontiers = {name: _frontier(values, costs[name]) for name in ("ms", "mb")}
    count, done = len(chosen) + sum(map(len, frontiers.values())), itertools.count(1)
    wanted = outputs_of(teacher, images)

    def measured(title: str, indices: Sequence[int], *, timed: bool) -> Model:
        bits = {product.name: CANDIDATES[index] for product, index in zip(products, indices, strict=True)}
        model.set(_widths(model, products, bits))
        distance, agrees = model.distance(images, wanted), agreement(student, teacher, images)
        milliseconds = stopwatch.measure(bits) if timed else None
        tell("models", next(done), count)
        amounts = {name: cost.of(indices) / UNITS[name].size for name, cost in costs.items()}
        return Model(title, bits, amounts, total(values, indices), distance, agrees, milliseconds)

    best, *uniform = (measured(title, indices, timed=True) for title, indices in chosen.items())
    lines = {
        name: [measured(f"{UNITS[name].name} alone", indices, timed=False) for indices in of]
        for name, of in frontiers.items()
    }
    overrides = {
        name: pair for product in products for name, pair in product.overrides(best.bits[product.name]).items()
    }
    engine = stopwatch.reference
    return Found(dict(overrides), best, uniform, lines, distances, engine.threads, engine.instruction_set)


def _widths(model: Rescaled, products: Sequence[FreeProduct], bits: Mapping[str, Bits]) -> dict[str, int]:
    """Return the bits of every quantizer, by the bits of the free products; all others have those of the ends."""
    widths = dict.fromkeys(model.quantizers, EDGE_BITS)
    for product in products:
        widths |= dict.fromkeys(product.weights, bits[product.name].weight)
        widths[product.inputs] = bits[product.name].activation
    return widths


def check_budgets(budgets: Mapping[str, float]) -> None:
    """Refuse budgets that cannot be meant.

    Raises:
        ConfigError: if there is none, or one is no number above 0, or of another name than those of :data:`UNITS`.
    """
    if not budgets or not budgets.keys() <= UNITS.keys():
        options = [f"--budget-{name}" for name in UNITS]
        raise ConfigError(f"Give a budget: {', '.join(options[:-1])} or {options[-1]}, or several of them.")
    for name, limit in budgets.items():
        check_number(f"--budget-{name}", limit, above_zero=True)


def _chosen(values: Numbers, costs: Mapping[str, Cost], budgets: Mapping[str, float]) -> list[int]:
    """Return the best candidate of every product within the budgets.

    Raises:
        ConfigError: if nothing keeps them, with the least that something takes.
    """
    # To a thousandth of a byte or an operation: what a decimal fraction becomes in binary must not decide.
    limits = {name: limit if name == "ms" else round(limit * UNITS[name].size, 3) for name, limit in budgets.items()}
    try:
        return choose(
            values,
            {name: costs[name].by_candidate for name in limits},
            {name: limit - costs[name].fixed for name, limit in limits.items()},
        )
    except UnmetError as unmet:
        name, unit = unmet.limit, UNITS[unmet.limit]
        before = list(budgets)[: list(budgets).index(name)]
        kept = f" that keeps {' and '.join(f'--budget-{other}' for other in before)}" if before else ""
        least = _rounded_up((unmet.least + costs[name].fixed) / unit.size)
        raise ConfigError(
            f"No bits keep --budget-{name} {budgets[name]:g}: the least of a model{kept} is {least:g} {unit.name}."
        ) from None


def _rounded_up(value: float, digits: int = 4) -> float:
    """Return a positive number rounded up to some significant digits."""
    places = digits - 1 - math.floor(math.log10(value))
    return float(round(math.ceil(value * 10.0**places) / 10.0**places, max(places, 0)))


def _distance(product: FreeProduct, bits: Bits, distances: Distances) -> float:
    """Return the distance of the outputs that a product's bits bring about, as a sum over its quantizers."""
    return distances[product.inputs][bits.activation] + sum(distances[name][bits.weight] for name in product.weights)


def _frontier(values: Numbers, cost: Cost) -> list[list[int]]:
    """Return the best choices for some budgets of one cost, from the least there is to what the best model takes."""
    costs = {"cost": cost.by_candidate}
    least = sum(map(min, cost.by_candidate))
    most = total(cost.by_candidate, choose(values, {}, {}))
    found: list[list[int]] = []
    for limit in np.linspace(least, most, _FRONTIER):
        chosen = choose(values, costs, {"cost": float(limit)})
        if chosen not in found:
            found.append(chosen)
    return found
