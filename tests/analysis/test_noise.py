from __future__ import annotations

import numpy as np
import pytest
import torch

from members import family_member, student_of
from qvit import QuantConfig, quantize
from qvit.analysis.noise import ModelNoise, override_for, worst
from qvit.cli.options import parse_overrides
from qvit.errors import DataError, UncalibratedError
from qvit.nn.quantizer import Quantizer, fake_quantize

MEMBERS = ["swin", "relpos", "eva02", "perception_encoder"]


def noise_of(student, images):
    noise = ModelNoise(student)
    with torch.no_grad():
        for batch in images.split(3):
            with noise.watching():
                student(batch)
    return noise.result()


def test_against_an_explicit_computation(vit, images):
    student = student_of(vit, images, QuantConfig(3, 2, overrides={"blocks.1.mlp.fc1": (8, 2)}))
    seen = {}
    for name, module in student.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_pre_hook(lambda q, args, name=name: seen.setdefault(name, []).append(args[0]))
    results = noise_of(student, images)
    assert [noise.name for noise in results] == [n for n, m in student.named_modules() if isinstance(m, Quantizer)]
    for noise in results:
        quantizer = student.get_submodule(noise.name)
        x = torch.cat(seen[noise.name]) if quantizer.batched else seen[noise.name][0]
        scale, offset = quantizer.scale, quantizer.offset
        values = fake_quantize(x, scale, offset, quantizer.low, quantizer.high).detach().double()
        steps = ((x if offset is None else x - offset) / scale).detach()
        signal = (x.double() - x.double().mean()).square().sum()
        assert noise.snr == pytest.approx(
            10 * float(torch.log10(signal / (values - x).square().sum()).detach()), abs=1e-3
        )
        outside = (steps < quantizer.low) | (steps > quantizer.high)
        assert noise.clipped == pytest.approx(float(outside.double().mean()), abs=1e-9)
        groups = x.movedim(1, 0) if quantizer.batched and quantizer.log_scale.numel() > 1 else [x]
        scales = quantizer.log_scale.numel() if quantizer.batched else 1
        codes = quantizer.codes(x)
        codes = codes.movedim(1, 0) if len(groups) > 1 else [codes]
        assert noise.codes == scales * 2**quantizer.bits
        assert noise.unused == noise.codes - sum(len(np.unique(group.numpy())) for group in codes)
        assert noise.bits == quantizer.bits
        assert (noise.outliers is None) == (not quantizer.batched or noise.name.endswith("attention_quantizer"))


def test_outlier_channels_are_found(vit, images):
    with torch.no_grad():  # the same function: a channel of the norm large, the column that reads it small
        vit.blocks[1].norm2.weight[5] *= 100
        vit.blocks[1].norm2.bias[5] *= 100
        vit.blocks[1].mlp.fc1.weight[:, 5] /= 100
        vit.blocks[0].attn.qkv.weight[3] *= 100  # query channel 3 of head 0
    found = {noise.name: noise for noise in noise_of(student_of(vit, images, QuantConfig(4)), images)}
    assert found["blocks.1.mlp.fc1.input_quantizer"].outliers == [5]
    assert found["blocks.0.mlp.fc1.input_quantizer"].outliers == []
    assert "outlier channels 1" in found["blocks.1.mlp.fc1.input_quantizer"].complaints
    assert found["blocks.0.attn.query_quantizer"].outliers == [3]
    assert worst(list(found.values()), 1)[0].name == "blocks.0.attn.query_quantizer"


@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_to_be_tried_gives_that_quantizer_8_bits_and_no_other(member):
    teacher, _ = family_member(member)
    config = QuantConfig(2, 3, rectifier=None)
    student = quantize(teacher, config)
    bits = {name: m.bits for name, m in student.named_modules() if isinstance(m, Quantizer)}
    names = [name for name, value in bits.items() if value < 8]
    assert all(override_for(student, name) is None for name in bits.keys() - set(names))
    last = [name for name in names if name.split(".")[-2:] == names[-1].split(".")[-2:]]
    for name in {*names[:8], *last}:  # the others are called the same, block after block
        override = override_for(student, name)
        other = quantize(teacher, QuantConfig(2, 3, rectifier=None, overrides=parse_overrides([override])))
        found = {name: m.bits for name, m in other.named_modules() if isinstance(m, Quantizer)}
        assert found == {**bits, name: 8}, override


def test_a_constant_loses_nothing_and_is_not_among_the_worst(vit, images):
    with torch.no_grad():
        vit.blocks[0].norm1.weight.zero_()
        vit.blocks[0].norm1.bias.zero_()
    results = noise_of(student_of(vit, images, QuantConfig(4)), images)
    assert next(noise for noise in results if noise.name == "blocks.0.attn.qkv.input_quantizer").snr is None
    assert all(noise.snr is not None for noise in worst(results, 100))


def test_refusals(vit, images):
    with pytest.raises(UncalibratedError, match=r"patch_embed\.proj\.input_quantizer has no scale"):
        ModelNoise(quantize(vit))
    student = student_of(vit, images, QuantConfig(4))
    with pytest.raises(DataError, match=r"What enters patch_embed\.proj\.input_quantizer holds a NaN"):
        noise_of(student, images * float("nan"))
