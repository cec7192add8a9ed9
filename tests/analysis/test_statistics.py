from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.statistics import BINS, attention_distance, code_entropy, query_key_statistics
from qvit.errors import DataError, TeacherMismatchError, UncalibratedError, UnsupportedModelError


def quantized(model, images, bits=4, rectifier="head", **kwargs):
    student = quantize(model, QuantConfig(bits, bits, rectifier=rectifier, **kwargs))
    calibrate(student, [images])
    return student.eval()


def float_queries_and_keys(model, images):
    """The queries and keys of each block, from timm's own modules one after the other: lists of (B, H, N, D)."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    queries, keys = [], []
    for block in model.blocks:
        y = block.norm1(x)
        b, n, _ = y.shape
        q, k, _ = block.attn.qkv(y).reshape(b, n, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries.append(q)
        keys.append(k)
        x = block(x)
    return queries, keys


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_that_are_equally_likely_have_the_entropy_of_their_bound(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int16).repeat(5)
    assert code_entropy(codes, 2**bits) == pytest.approx(bits, abs=1e-12)


def test_entropy_of_unequal_codes():
    assert code_entropy(torch.tensor([0, 0, 1, 2]), 4) == pytest.approx(1.5)
    assert str(code_entropy(torch.zeros(9, dtype=torch.int16), 4)) == "0.0"


def test_codes_that_the_levels_cannot_hold_are_refused():
    with pytest.raises(DataError, match="5 different codes"):
        code_entropy(torch.arange(5), 4)
    with pytest.raises(DataError):
        code_entropy(torch.zeros(0, dtype=torch.int16), 4)


def test_float_model_against_numpy(vit, images):
    with torch.no_grad():
        queries, keys = float_queries_and_keys(vit, images)
    for layer, q, k in zip(query_key_statistics(vit, [images]), queries, keys, strict=True):
        q, k = q.numpy().astype(np.float64), k.numpy().astype(np.float64)
        assert (layer.query_mean, layer.query_std) == pytest.approx((q.mean(), q.std()), rel=1e-4, abs=1e-5)
        assert (layer.key_mean, layer.key_std) == pytest.approx((k.mean(), k.std()), rel=1e-4, abs=1e-5)
        assert layer.values == q.size
        assert len(layer.counts) == BINS
        assert 0.99 * q.size < layer.counts.sum() < q.size
        np.testing.assert_allclose(layer.edges[[0, -1]], np.percentile(q, [0.1, 99.9]), rtol=1e-4)
        assert layer.query_entropy is layer.key_entropy is layer.query_bits is layer.key_bits is None


@pytest.mark.parametrize("rectifier", ["head", "token", None])
def test_entropy_of_a_student_head_by_head(vit, images, rectifier):
    student = quantized(vit, images, rectifier=rectifier, overrides={"blocks.1.attn.key_quantizer": 2})
    seen = {}
    for index, block in enumerate(student.blocks):
        for part in ("query_quantizer", "key_quantizer"):
            getattr(block.attn, part).register_forward_hook(
                lambda module, args, output, key=(index, part): seen.__setitem__(key, output)
            )
    with torch.no_grad():
        student(images)
    layers = query_key_statistics(student, [images])
    assert [layer.layer for layer in layers] == [0, 1]
    assert [(layer.query_bits, layer.key_bits) for layer in layers] == [(4, 4), (4, 2)]
    for layer in layers:
        for part, entropy in (("query_quantizer", layer.query_entropy), ("key_quantizer", layer.key_entropy)):
            expected = []
            for head in seen[layer.layer, part].movedim(1, 0):  # values on the grid, instead of codes
                _, counts = np.unique(head.numpy(), return_counts=True)
                p = counts / counts.sum()
                expected.append(-(p * np.log2(p)).sum())
            assert entropy == pytest.approx(np.mean(expected), abs=1e-9)
        assert 2 < layer.query_entropy < 4


def test_batches_add_up(vit, images):
    student = quantized(vit, images)
    whole = query_key_statistics(student, [images])
    parts = query_key_statistics(student, ((images[i : i + 5], "labels") for i in range(0, 20, 5)))
    for a, b in zip(whole, parts, strict=True):
        numbers = [
            (x.query_mean, x.query_std, x.key_mean, x.key_std, x.query_entropy, x.key_entropy, x.values) for x in (a, b)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)
        assert b.counts.sum() > 0.98 * b.values


def test_model_is_left_as_it_was(vit, images):
    student = quantized(vit, images).train()
    before = copy.deepcopy(student.state_dict())
    query_key_statistics(student, [images])
    attention_distance(vit, student, [images])
    assert student.training
    assert not vit.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_statistics_refuse_what_they_cannot_mean(vit, images):
    with pytest.raises(DataError, match="at least one image"):
        query_key_statistics(vit, [images[:0]])
    with pytest.raises(DataError, match="layer 0"):
        query_key_statistics(vit, [images * float("nan")])
    with pytest.raises(UnsupportedModelError, match="Linear"):
        query_key_statistics(torch.nn.Linear(2, 2), [images])
    with pytest.raises(UncalibratedError):
        query_key_statistics(quantize(vit), [images])


def test_distance_of_a_model_to_itself_is_zero(vit, images):
    distance = attention_distance(vit, vit, [images])
    assert distance.shape == (2, 2)
    assert torch.equal(distance, torch.zeros(2, 2, dtype=torch.float64))


def test_distance_falls_with_bits(vit, images):
    distances = [float(attention_distance(vit, quantized(vit, images, b), [images]).mean()) for b in (8, 4, 2)]
    assert 0 < distances[0] < 0.05
    assert distances[0] < distances[1] < distances[2] < 1


@pytest.mark.parametrize("rectifier", ["head", "token"])
def test_distance_against_an_explicit_computation(vit, images, rectifier):
    student = quantized(vit, images, 3, rectifier)
    captured = {"queries": [], "keys": []}
    for block in student.blocks:
        for part, kept in (("query_quantizer", captured["queries"]), ("key_quantizer", captured["keys"])):
            getattr(block.attn, part).register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
    with torch.no_grad():
        student(images)
        queries, keys = float_queries_and_keys(vit, images)
    student_queries, student_keys = list(captured["queries"]), list(captured["keys"])
    distance = attention_distance(vit, student, [images[:9], (images[9:], None)])
    for layer in range(2):
        scale = vit.blocks[layer].attn.scale

        def attention(q, k, scale=scale):
            logits = scale * np.einsum("bhid,bhjd->bhij", q.double().numpy(), k.double().numpy())
            return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

        teacher_map = attention(queries[layer], keys[layer])
        student_map = attention(student_queries[layer], student_keys[layer])
        expected = 0.5 * np.abs(teacher_map - student_map).sum(axis=-1).mean(axis=(0, 2))
        np.testing.assert_allclose(distance[layer], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "the teacher has 3 attention layers, the student 2"),
        ({"num_heads": 4}, "the teacher has 4 attention heads, the student 2"),
        ({"patch_size": 8}, "the teacher has 5 tokens, the student 17"),
    ],
)
def test_models_that_cannot_be_compared(make_model, vit, images, changes, message):
    with pytest.raises(TeacherMismatchError, match=message):
        attention_distance(make_model(**changes), vit, [images])
