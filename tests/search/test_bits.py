"""What bits do to a model of any family: its scales, its program and file, its cost, and its outputs."""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import make_vit
from members import family_member
from qvit import QuantConfig, calibrate, quantize
from qvit.bench.random_model import random_model
from qvit.config import Bits
from qvit.format.packed import read_packed, write_packed
from qvit.format.program import Program
from qvit.models.families import classifies, image_size_of, lower
from qvit.quantization.calibrate import scales_by_bits
from qvit.quantization.outputs import output_distance
from qvit.search import timing
from qvit.search.cost import counted_costs
from qvit.search.products import CANDIDATES, FreeProduct, free_products
from qvit.search.sensitivity import Rescaled, outputs_of, sensitivities
from qvit.search.timing import Stopwatch

KINDS = ("swin", "eva02_inner_norms", "dinov3_plus", "siglip", "swinv2_cr")
EVERY = pytest.mark.parametrize("kind", ["vit", *KINDS])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try few ranges where a scale is fitted: how good they are is not asked here."""
    monkeypatch.setattr("qvit.quantization.calibrate._FRACTIONS", (1.0, 0.7))
    monkeypatch.setattr("qvit.quantization.calibrate._FINE_FRACTIONS", (1.0, 0.7))


@functools.cache
def float_model(kind: str) -> tuple[nn.Module, Tensor]:
    return (make_vit(), torch.randn(8, 3, 16, 16)) if kind == "vit" else family_member(kind)


def student_of(kind: str, overrides: dict[str, Bits] | None = None) -> tuple[nn.Module, Program]:
    student = quantize(float_model(kind)[0], QuantConfig(8, 8, rectifier=None, overrides=overrides or {}))
    return student, lower(student, image_size_of(student))[0]


def any_bits(products: list[FreeProduct], seed: int) -> dict[str, Bits]:
    rng = random.Random(seed)
    return {product.name: rng.choice(CANDIDATES) for product in products}


@pytest.mark.parametrize("kind", ["vit", "siglip", "eva02_inner_norms"])
def test_a_student_that_takes_other_bits_is_one_that_was_calibrated_at_them(kind: str) -> None:
    teacher, images = float_model(kind)
    batches = [images[:5], images[5:]]
    student, _ = student_of(kind)
    model = Rescaled(student, scales_by_bits(student, batches, (2, 5)))
    for bits in (5, 2):
        model.set(dict.fromkeys(model.quantizers, bits))
        other = quantize(teacher, QuantConfig(bits, bits, rectifier=None, overrides={"*": bits}))
        calibrate(other, batches)
        state, expected = student.state_dict(), other.state_dict()
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert torch.equal(value, expected[name]), name
        assert torch.equal(outputs_of(student, batches), outputs_of(other, batches))


@pytest.mark.parametrize("kind", ["vit", "swin", "siglip"])
def test_sensitivities_are_distances_with_one_quantizer_alone(kind: str) -> None:
    _, images = float_model(kind)
    student, program = student_of(kind)
    batches = [images[:5], images[5:]]
    scales = scales_by_bits(student, batches, (2, 4))
    model = Rescaled(student, scales)
    products = free_products(student, program)
    names = list(dict.fromkeys(name for product in products for name in (product.inputs, *product.weights)))
    ends = set(model.quantizers) - set(names)
    assert {name.split(".")[0] for name in ends} <= {"patch_embed", "head"}
    sample = names[:: max(1, len(names) // 5)]
    told: list[tuple[int, int]] = []
    found = sensitivities(model, batches, sample, (2, 4), lambda done, todo: told.append((done, todo)))
    assert told == [(done, 2 * len(sample)) for done in range(1, 2 * len(sample) + 1)]
    assert not any("forward" in vars(module) for module in student.modules())
    model.set({})
    wanted = outputs_of(student, batches)
    for name in sample:
        for bits in (2, 4):
            model.set({name: bits})
            distance = float(output_distance(outputs_of(student, batches), wanted, classes=classifies(student)))
            before = found[name][2] if bits == 4 else distance
            assert found[name][bits] == pytest.approx(min(distance, before), rel=1e-5, abs=1e-9)
    assert max(found[name][2] for name in sample) > 0


@EVERY
def test_costs_are_those_of_the_file_that_the_overrides_make(kind: str, tmp_path: Path) -> None:
    student, program = student_of(kind)
    products = free_products(student, program)
    costs = counted_costs(program, products)
    for seed in range(3):
        bits = any_bits(products, seed)
        overrides = {name: pair for product in products for name, pair in product.overrides(bits[product.name]).items()}
        made = student_of(kind, overrides)[1]
        program_bits = {
            name: pair for product in products for name, pair in product.program_bits(bits[product.name]).items()
        }
        assert program.with_bits(program_bits) == made
        write_packed(tmp_path / "m", random_model(made))
        chosen = [CANDIDATES.index(bits[product.name]) for product in products]
        model = read_packed(tmp_path / "m")
        assert costs["mb"].of(chosen) == sum(array.nbytes for array in model.tensors.values())
        assert costs["bops"].of(chosen) == sum(
            product.macs * product.bits.weight * product.bits.activation for product in model.program.products()
        )


@EVERY
def test_times_add_up_and_pairs_that_are_computed_in_one_way_have_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, program = student_of(kind)
    products = free_products(student, program)
    stopwatch = Stopwatch(program, products, 1)
    by_name = {product.name: product for product in products}

    def taken(bits: dict[str, Bits]) -> float:
        return 9.0 + sum(by_name[n].macs * len(stopwatch._way(by_name[n], pair)[0]) for n, pair in bits.items())

    reference = {product.name: Bits(8, 8) for product in products}
    monkeypatch.setattr(stopwatch, "_compare", lambda bits: ([taken(reference)] * 2, [taken(bits)] * 2))
    told: list[tuple[int, int]] = []
    times = stopwatch.times(lambda done, todo: told.append((done, todo)))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    for seed in range(3):
        bits = any_bits(products, seed)
        assert times.whole(bits) == pytest.approx(taken(bits))
    for product, (first, second) in itertools.product(products, itertools.combinations(CANDIDATES, 2)):
        if stopwatch._way(product, first) == stopwatch._way(product, second):
            assert times.differences[product.name][first] == times.differences[product.name][second]


def test_a_model_is_timed_as_a_whole() -> None:
    student, program = student_of("vit")
    products = free_products(student, program)
    stopwatch = Stopwatch(program, products, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", 2)
        assert 0 < stopwatch.measure({product.name: Bits(2, 4) for product in products}) < 1e4
    assert stopwatch.reference.threads == 1
