"""One model from every side, in a pass that keeps no image."""

from __future__ import annotations

import pickle
import weakref

import numpy as np
import pytest

from conftest import make_vit
from members import family_member, student_of
from qvit import QuantConfig
from qvit.analysis.attention_range import attention_grids
from qvit.analysis.divergence import divergence
from qvit.analysis.examination import Examination
from qvit.analysis.statistics import QueryKeyStatistics, attention_distance, query_key_statistics
from qvit.errors import DataError, TeacherMismatchError
from qvit.models.families import image_size_of

MEMBERS = ["swin", "swinv2", "swinv2_cr", "beit", "relpos", "eva02", "siglip", "dinov3"]


def examined(teacher, student, images, labels=None, size=4):
    grids = attention_grids(teacher, image_size_of(teacher))
    first = Examination(teacher, grids)
    second = Examination(student, grids, first)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        attended = first.add(images[part], None if labels is None else labels[part])
        second.add(images[part], None if labels is None else labels[part], attended)
    return first, second


@pytest.mark.parametrize("member", MEMBERS)
def test_every_family_is_examined_as_by_the_functions_for_each_side(member):
    teacher, images = family_member(member)
    student = student_of(teacher, images, QuantConfig(3, 3))
    first, second = (examination.result() for examination in examined(teacher, student, images))
    distances = attention_distance(teacher, student, [images])
    whole = query_key_statistics(student, [images])
    assert first["quantizers"] == []
    assert len(second["quantizers"]) > 20
    assert ("same_class" in second) == (member != "dinov3")
    for layer, statistics, distance in zip(second["layers"], whole, distances, strict=True):
        assert layer["query_entropy"] == pytest.approx(statistics.query_entropy, abs=1e-6)
        assert layer["query_std"] == pytest.approx(statistics.query_std, rel=1e-4)
        assert layer["attention_distance"] == pytest.approx(distance[~distance.isnan()].tolist(), abs=1e-6)
        assert len(layer["attention_range"]) == len(layer["attention_distance"])
        assert layer["query_divergence"] > 0
        assert layer["key_divergence"] > 0
        assert sum(layer["key_counts"]) > 0.9 * layer["values"]
    for layer, other_layer in zip(first["layers"], second["layers"], strict=True):
        assert layer["edges"] == other_layer["edges"]
        assert layer["key_edges"] == other_layer["key_edges"]
        assert "query_divergence" not in layer


def test_what_is_kept_does_not_grow_with_the_images(vit, images):
    student = student_of(vit, images, QuantConfig(4))
    grids = attention_grids(vit, (16, 16))
    first = Examination(vit, grids)
    second = Examination(student, grids, first)
    kept, batches = [], []
    for number in range(6):
        batch = images[:4] + 0.1 * number
        batches.append(weakref.ref(batch))
        attended = first.add(batch, None)
        maps = weakref.ref(attended.maps[0])
        second.add(batch, None, attended)
        del batch, attended
        assert maps() is None
        kept.append([len(pickle.dumps((e.statistics, e.range, e.distance))) for e in (first, second)])
        noise = second.noise._sums.values()
        kept[-1].append(sum(s.counts.numel() + (0 if s.smallest is None else s.smallest.numel()) for s in noise))
    assert all(batch() is None for batch in batches)
    assert kept[1:] == [pytest.approx(kept[1], rel=1e-3)] * 5  # a number more has some digits more
    assert first.images == second.images == 24


def test_a_model_is_no_distance_from_itself(vit, images, labels):
    first, second = (examination.result() for examination in examined(vit, vit, images, labels))
    assert second["same_class"] == 100
    assert first["top1"] == second["top1"]
    for layer in second["layers"]:
        assert layer["query_divergence"] == layer["key_divergence"] == 0
        assert layer["attention_distance"] == [0, 0]


def test_other_sizes_and_numbers_that_are_none_are_refused(vit, images):
    other = make_vit(num_heads=3)
    with pytest.raises(TeacherMismatchError, match="the teacher has 2 attention heads, the student 3"):
        examined(vit, other, images)
    with pytest.raises(DataError, match="NaN or an infinity"):
        examined(vit, vit, images * float("inf"))


def statistics_with(counts, values, shift=0.0):
    edges = np.linspace(0, 1, 5) + shift
    counts = np.array(counts)
    return QueryKeyStatistics(0, 0, 1, 0, 1, values, counts, edges, None, None, None, None, counts[::-1], edges)


def test_divergence_against_its_definition():
    first, second = statistics_with([10, 20, 30, 40], 110), statistics_with([40, 0, 30, 30], 100)
    p, q = np.array([10, 20, 30, 40, 10]) + 0.5, np.array([40, 0, 30, 30, 0]) + 0.5
    p, q = p / p.sum(), q / q.sum()
    queries, keys = divergence(first, second)
    assert queries == pytest.approx((p * np.log2(p / q)).sum())
    assert keys > 0
    assert divergence(first, first) == (0, 0)
    with pytest.raises(DataError, match="different bins"):
        divergence(first, statistics_with([1, 1, 1, 1], 4, shift=0.1))


def test_records_from_before_the_keys_had_a_histogram_are_read():
    record = statistics_with([1, 2, 3, 4], 10).to_dict()
    assert np.array_equal(QueryKeyStatistics.from_dict(record).key_counts, [4, 3, 2, 1])
    del record["key_counts"], record["key_edges"]
    assert QueryKeyStatistics.from_dict(record).key_counts.size == 0
