"""Other authors' quantizers are trained and measured like ours, and no packed file is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import qvit
from members import family_member, preprocessing
from qvit import QuantConfig, quantize
from qvit.data.sources import ImageSets
from qvit.errors import ConfigError, UnsupportedModelError
from qvit.models.checkpoint import load_checkpoint
from qvit.nn.quantizer import Quantizer
from qvit.study.ablation import RIVAL_ROWS, ablate, rows_named
from qvit.study.rivals import (
    RIVALS,
    AnnealedLoss,
    ChannelLinear,
    ChannelQuantizer,
    StatisticsQuantizer,
    lsq_scales,
    with_channels,
)
from qvit.train.methods import FloatModel
from qvit.train.options import Options
from qvit.train.recipe import load_recipe


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, digits: ImageSets) -> dict[str, dict]:
    recipe = load_recipe(
        "digits", ["quantized.epochs=1", "quantized.batch_size=256", "quantized.calibration_images=64"]
    )
    found = ablate(
        FloatModel(*load_checkpoint(teacher_file)),
        digits,
        recipe,
        Options(tmp_path_factory.mktemp("rivals"), workers=0),
        Console(quiet=True),
        bits=[2],
        seeds=[0],
        rows=rows_named("baseline,ofq-annealed,authors-q-vit-token"),
    )
    return {record["row"].removesuffix("-token"): record for record in found}


def test_rivals_are_rows_like_ours(records: dict[str, dict]) -> None:
    assert records.keys() == {"baseline", "ofq-annealed", "authors-q-vit"}
    assert len({record["weights"] for record in records.values()}) == len(records)
    assert all(record["history"][0]["train_loss"] < 20 for record in records.values())
    assert [rows_named(row.name) for row in RIVAL_ROWS] == [[row] for row in RIVAL_ROWS]


@pytest.mark.parametrize("name", RIVALS)
def test_student_of_a_rival_is_not_exported(vit: nn.Module, images: Tensor, tmp_path: Path, name: str) -> None:
    student = quantize(vit, QuantConfig(2, 2, rectifier=None))
    adapt, initialize = RIVALS[name].adapt, RIVALS[name].initialize or qvit.calibrate
    assert adapt is not None
    adapt(student)
    initialize(student, [images])
    assert torch.isfinite(student(images)).all()
    with pytest.raises(UnsupportedModelError, match="may compute otherwise|not as qvit.quantize makes it"):
        qvit.export(student, tmp_path / "rival.safetensors", preprocessing=preprocessing(), classes=["a"] * 10)


def test_ladder_of_what_cannot_be_loaded_is_refused(teacher: FloatModel, digits: ImageSets, tmp_path: Path) -> None:
    rows = rows_named("statsq")
    with pytest.raises(ConfigError, match="which row statsq cannot"):
        ablate(
            teacher,
            digits,
            load_recipe("digits"),
            Options(tmp_path),
            Console(),
            bits=[4, 2],
            seeds=[0],
            rows=rows,
            ladder=True,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["swin", "eva02"])
def test_blocks_of_other_families_are_adapted_or_refused(name: str) -> None:
    model, _ = family_member(name)
    for rival, method in RIVALS.items():
        student = quantize(model, QuantConfig(2, 2, rectifier=None))
        assert method.adapt is not None
        if rival in ("token-scales", "ofq", "ofq-annealed"):
            with pytest.raises(UnsupportedModelError, match="scale per token"):
                method.adapt(student)
            continue
        method.adapt(student)
        kinds = (StatisticsQuantizer, ChannelQuantizer)
        assert sum(isinstance(module, kinds) for module in student.modules()) >= 2 * 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_statistics_quantizer_is_the_equation(bits: int) -> None:
    weight = torch.randn(5, 64, dtype=torch.float64).float().requires_grad_()
    quantizer = StatisticsQuantizer(bits, 5)
    values = quantizer(weight)
    count = 2 ** (bits - 1)
    size = 2 * weight.abs().mean(dim=1, keepdim=True)
    levels = size[..., None] * (torch.arange(-count, count) + 0.5) / count  # (5, 1, 2 count)
    nearest = (weight[..., None] - levels).abs().argmin(dim=-1)
    assert torch.allclose(values, levels.expand(5, 64, -1).gather(2, nearest[..., None])[..., 0], atol=1e-6)
    values.backward(torch.ones_like(values))
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_annealed_weights_learn_near_borders_alone() -> None:
    weight = torch.linspace(-1, 1, 2001)[None].requires_grad_()
    quantizer = StatisticsQuantizer(2, 1)
    quantizer.annealed = True
    quantizer(weight).sum().backward()
    learning = weight[weight.grad != 0].detach() / (2 * weight.detach().abs().mean())  # borders: -1/2, 0, 1/2
    assert 0 < len(learning) < 40
    assert (learning[:, None] - torch.tensor([-0.5, 0.0, 0.5])).abs().amin(dim=1).max() < 0.006


def test_loss_anneals_at_its_end(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    student = quantize(vit, QuantConfig(2, 2, rectifier=None))
    RIVALS["ofq-annealed"].adapt(student)
    qvit.calibrate(student, [images])
    loss = AnnealedLoss(vit, guided=False)
    quantizer = student.blocks[0].attn.qkv.weight_quantizer
    for progress, annealed in ((0.0, False), (0.7, False), (0.8, True)):
        loss.progress = progress
        loss(student, images, labels)
        assert quantizer.annealed is annealed


def test_scale_per_channel_is_exact_in_integers(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit, QuantConfig(3, 3, rectifier=None))
    with_channels(student)
    lsq_scales(student, [images])
    layer = student.blocks[0].mlp.fc1
    assert type(layer) is ChannelLinear
    x = torch.randn(4, 7, layer.in_features)
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    codes = inputs.codes(x).double() @ weights.codes(layer.weight * inputs.scale).double().T  # whole numbers
    constant = (weights.scale * weights.codes(layer.weight * inputs.scale) / inputs.scale * inputs.offset).sum(dim=1)
    expected = codes * weights.scale.T + constant + layer.bias
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)


def test_authors_start_is_one_scale_for_all_weights_of_a_layer(vit: nn.Module, images: Tensor) -> None:
    student = quantize(vit, QuantConfig(2, 2, rectifier=None))
    lsq_scales(student, [images, images * 100])  # the first batch alone counts
    layer = student.blocks[1].mlp.fc2
    assert torch.allclose(layer.weight_quantizer.scale, 2 * layer.weight.abs().mean() / 1**0.5)
    assert all(module.calibrated for module in student.modules() if isinstance(module, Quantizer))
