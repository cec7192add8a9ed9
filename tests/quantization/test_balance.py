"""A float model with outlier channels is quantized like the same function without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import make_vit
from members import FAMILY_MEMBERS, MEMBERS, SIZES, family_member, images_for
from outliers import feeds_of, with_outliers
from qvit import QuantConfig, calibrate, quantize
from qvit.data.loader import make_loader, make_transform
from qvit.data.sources import ImageSets
from qvit.errors import DataError
from qvit.nn.modes import switched_off
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectifier import Rectifier
from qvit.quantization.balance import IMAGES
from qvit.train.methods import FloatModel

WITHOUT = {"no_affine_norm", "post_norm", "eva_post_norm", "relpos_mlp", "swinv2", "swinv2_pretrained_window"}
"""Members whose blocks have no norm with a weight in front of their layers."""


def make_member(name: str) -> tuple[nn.Module, Tensor]:
    if name in FAMILY_MEMBERS:
        return family_member(name)
    model = make_vit(MEMBERS[name][0], **MEMBERS[name][1])
    return model, images_for(int(model.patch_embed.proj.in_channels), SIZES.get(name, (16, 16)))  # type: ignore[union-attr]


def calibrated(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    student = quantize(model, QuantConfig(bits, bits))
    calibrate(student, [images])
    return student.eval()


@pytest.mark.parametrize(
    "name", ["deit", "swiglu", "attention_norm", "rms_norm", "swin", "beit_all", "eva02", "dinov3"]
)
def test_outlier_of_a_power_of_two_changes_not_one_bit(name: str) -> None:
    model, images = make_member(name)
    plain = calibrated(model, images, 4)
    assert torch.equal(calibrated(with_outliers(model, images, 1024.0), images, 4)(images), plain(images))


@pytest.mark.parametrize("name", [*MEMBERS, *FAMILY_MEMBERS])
def test_norms_in_front_of_layers_are_found(name: str) -> None:
    model, _ = make_member(name)
    ends = {id(module) for name, module in model.named_modules() if name.startswith("head")}
    assert any(id(layers[0]) not in ends for _, layers in feeds_of(model)) == (name not in WITHOUT)


@pytest.mark.parametrize("bits", [8, 4])
def test_model_with_outliers_agrees_as_the_one_without(teacher: FloatModel, digits: ImageSets, bits: int) -> None:
    transform = make_transform(teacher.spec.preprocessing)
    images, held_out = (
        next(iter(make_loader(part, transform, 512, shuffle=False))).images for part in (digits.train, digits.val)
    )
    plain = calibrated(teacher.model, images, bits)
    other = calibrated(with_outliers(teacher.model, images, 1000.0), images, bits)
    with torch.no_grad():
        wanted, *found = (model(held_out).argmax(1) for model in (teacher.model, plain, other))
    agreement = [float((classes == wanted).float().mean()) for classes in found]
    assert abs(agreement[0] - agreement[1]) <= 0.01


def test_channel_that_is_far_away_is_moved_into_the_bias(vit: nn.Module, images: Tensor) -> None:
    other = copy.deepcopy(vit)
    with torch.no_grad():
        for norm, layers in feeds_of(other):
            norm.bias[3] += 100
            for layer in layers:
                layer.bias -= 100 * layer.weight[:, 3]
    assert torch.allclose(other(images), vit(images), atol=1e-3)
    wanted = vit(images)
    plain, moved = ((calibrated(model, images, 8)(images) - wanted).abs().mean() for model in (vit, other))
    assert moved <= 1.5 * plain


def test_channel_that_is_far_away_stays_where_no_bias_could_take_it(make_model, images: Tensor) -> None:
    model = make_model(qkv_bias=False)
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.bias[3] += 100
    student = calibrated(model, images, 8)
    with switched_off(m for m in student.modules() if isinstance(m, (Quantizer, Rectifier))):
        torch.testing.assert_close(student(images), model(images), rtol=1e-3, atol=1e-3)


def test_weights_without_outliers_stay_as_they_are(vit: nn.Module, images: Tensor) -> None:
    state = calibrated(vit, images, 2).state_dict()
    assert all(torch.equal(state[name], value) for name, value in vit.state_dict().items())


def test_weights_are_what_they_were_if_calibration_fails(vit: nn.Module, images: Tensor) -> None:
    student = quantize(with_outliers(vit, images, 1000.0))
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(DataError):
        calibrate(student, [images.repeat(IMAGES, 1, 1, 1)[:IMAGES], images * torch.nan])  # NaN is seen after balancing
    for name, value in student.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("tied", ["norm1", "mlp.fc1"])
def test_parameters_that_two_places_share_stay_as_they_are(vit: nn.Module, images: Tensor, tied: str) -> None:
    model: Any = with_outliers(vit, images, 1024.0)
    first, second = (block.get_submodule(tied) for block in model.blocks[:2])
    second.weight = first.weight
    student = quantize(model)
    calibrate(student, [images])
    state = student.state_dict()
    assert torch.equal(state[f"blocks.1.{tied}.weight"], second.weight)
