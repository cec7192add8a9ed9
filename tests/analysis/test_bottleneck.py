from __future__ import annotations

import pytest
import torch

from members import FAMILIES, family_member, student_of
from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.bottleneck import (
    EVERYTHING,
    KINDS,
    OUTSIDE,
    PARTS,
    Places,
    Tried,
    cells_of,
    grid_of,
    only,
    overrides_of,
    variants_of,
)
from qvit.nn.modes import evaluating
from qvit.nn.quantizer import Quantizer

MEMBERS = [next(iter(family)) for family in FAMILIES.values()] + ["dinov3", "perception_encoder", "siglip_classifier"]


def quantizers(model):
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantizer)}


@pytest.mark.parametrize("member", MEMBERS)
def test_parts_of_every_family_divide_it_and_can_be_trained_alone(member):
    teacher, _ = family_member(member)
    places = Places(quantize(teacher, QuantConfig(2, 3, rectifier=None)))
    names = [name for kind in (*KINDS, OUTSIDE) for name in places.kinds if places.kinds[name] == kind]
    assert sorted(names) == sorted(quantizers(quantize(teacher)))
    assert set(places.kinds.values()) == {*KINDS, OUTSIDE}
    assert sorted(places.of_part(EVERYTHING)) == sorted(names)
    assert all(".mlp" in name or ".ffn" in name for name in places.of_part("MLPs"))
    cells = cells_of(places)
    assert sorted(name for cell in cells.values() for name in cell) == sorted(set(names) - set(places.of_part(OUTSIDE)))
    for part in PARTS:
        config = QuantConfig(8, 8, rectifier=None, overrides=overrides_of(places.of_part(part), 3))
        for name, quantizer in quantizers(quantize(teacher, config)).items():
            assert quantizer.bits == (3 if name in places.of_part(part) else 8), (part, name)


def test_a_variant_quantizes_its_quantizers_alone(vit, images):
    student = quantize(vit, QuantConfig(2, 2, rectifier=None))
    calibrate(student, [images])
    places = Places(student)
    with torch.no_grad(), evaluating(student, vit):
        whole = student(images)
        with only(student, list(places.kinds)):
            assert torch.equal(student(images), whole)
        with only(student, []):
            torch.testing.assert_close(student(images), vit(images), rtol=1e-4, atol=1e-5)
        with only(student, ["blocks.0.mlp.fc1.weight_quantizer"]):
            assert not torch.allclose(student(images), vit(images), rtol=1e-3, atol=1e-3)
        assert torch.equal(student(images), whole)


def test_numbers_are_those_of_an_explicit_computation(vit, images, labels):
    student = student_of(vit, images, QuantConfig(2, 2, rectifier=None))
    variants = variants_of(Places(student))
    assert list(variants) == [*PARTS, *(f"but {part}" for part in PARTS if part != EVERYTHING)]
    tried = Tried(vit, student, variants)
    for part in (slice(0, 7), slice(7, None)):
        tried.add(images[part], labels[part])
    found = tried.result()
    with torch.no_grad():
        wanted, got = vit(images), student.eval()(images)
    assert tried.images == 16
    assert tried.float_top1() == pytest.approx(100 * float((wanted.argmax(1) == labels).double().mean()))
    everything = found[EVERYTHING]
    assert everything["same_class"] == pytest.approx(100 * float((wanted.argmax(1) == got.argmax(1)).double().mean()))
    assert everything["top1"] == pytest.approx(100 * float((got.argmax(1) == labels).double().mean()))
    p, q = wanted.softmax(1), got.softmax(1)
    assert everything["distance"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert 0 < found["MLP weights"]["distance"] < found["MLPs"]["distance"]


def test_blocks_of_a_feature_extractor_without_labels():
    teacher, images = family_member("dinov3")
    student = student_of(teacher, images, QuantConfig(2, 2, rectifier=None))
    places = Places(student)
    tried = Tried(teacher, student, cells_of(places))
    tried.add(images, None)
    grid = grid_of(places, tried.result(), "distance")
    assert [len(row) for row in grid] == [len(places.blocks)] * len(KINDS)
    assert all(value > 0 for row in grid for value in row)
    assert tried.result()[f"{places.blocks[0]} MLP weights"].keys() == {"distance"}
    assert tried.float_top1() is None
