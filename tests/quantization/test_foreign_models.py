"""What is no float model of timm's, or no whole student: refused, with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import qvit
from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.errors import UnsupportedModelError


class Module(nn.Module):
    """As a Lightning module or a user's own holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"vit": model})


class Extended(VisionTransformer):
    pass


def extended(vit: nn.Module) -> nn.Module:
    other = copy.deepcopy(vit)
    other.__class__ = Extended
    return other


def of_transformers(vit: nn.Module) -> nn.Module:
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    return transformers.ViTForImageClassification(config)


def of_torchvision(vit: nn.Module) -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, 1, 1, 8, 8)


def scripted(vit: nn.Module) -> nn.Module:
    return torch.jit.script(nn.Linear(2, 2))


OTHERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "DataParallel": (nn.DataParallel, r"a VisionTransformer is inside it; give model\.module\."),
    "compiled": (torch.compile, r"a VisionTransformer is inside it; give model\._orig_mod\."),
    "twice": (lambda vit: nn.DataParallel(torch.compile(vit)), r"give model\.module\._orig_mod\."),
    "sequential": (lambda vit: nn.Sequential(nn.Identity(), vit), r"give model\.1\."),
    "module": (Module, r"give model\.net\.vit\."),
    "quantized": (quantize, "it is quantized already; calibrate or train it as it is, or quantize the float model"),
    "quantized inside": (lambda vit: nn.Sequential(quantize(vit)), "it is quantized already"),
    "torchvision": (of_torchvision, r"a model of torchvision and not timm's; timm\.create_model makes those"),
    "transformers": (of_transformers, r"save_pretrained\(FOLDER\) writes it, and qvit train --teacher FOLDER"),
    "scripted": (scripted, "TorchScript; give the model that it was made of"),
    "extended": (extended, "may compute otherwise than the class of timm's"),
    "resnet": (lambda vit: timm.create_model("resnet10t"), "not timm's|timm.create_model makes those that qvit knows"),
    "nothing": (lambda vit: nn.Identity(), "timm.create_model makes those that qvit knows"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_other_model_says_what_to_do(vit: nn.Module, kind: str) -> None:
    make, sentence = OTHERS[kind]
    with pytest.raises(UnsupportedModelError, match=sentence) as caught:
        quantize(make(vit))
    assert str(caught.value).startswith("Cannot quantize the model (")
    assert len(str(caught.value)) < 400


def test_model_compiled_in_place_is_quantized(vit: nn.Module, images: Tensor) -> None:
    vit.compile(backend="eager")
    student = quantize(vit)
    calibrate(student, [images])
    assert torch.isfinite(student(images)).all()


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layer_that_computes_otherwise_is_refused_by_name(vit: Any) -> None:
    vit.blocks[1].mlp.fc1 = Doubled(24, 96)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mlp\.fc1 \(Doubled\): it does not compute as Linear"):
        quantize(vit)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weight_that_is_computed_is_refused_by_name(vit: Any, kind: Callable[[nn.Module], nn.Module]) -> None:
    kind(vit.blocks[0].attn.proj)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn\.proj .*remove_parametrizations"):
        quantize(vit)


# --- a student that is not whole --------------------------------------------------------------------------------------


def exchange(student: Any, part: str) -> None:
    if part == "head":
        student.reset_classifier(10)
    elif part == "patch_embed.proj":
        student.patch_embed.proj = nn.Conv2d(3, 24, 4, 4)
    elif part == "blocks.1.attn":
        student.blocks[1].attn = timm.layers.Attention(24, 2)
    else:
        student.blocks[0].mlp.fc2 = nn.Linear(96, 24)


@pytest.mark.parametrize("part", ["head", "patch_embed.proj", "blocks.1.attn", "blocks.0.mlp.fc2"])
def test_float_part_of_a_student_is_named_wherever_it_matters(vit, images, labels, part: str, tmp_path) -> None:
    student = quantize(vit, QuantConfig(4, 4))
    calibrate(student, [images])
    exchange(student, part)
    named = rf"{part} \((Linear|Conv2d|Attention)\) is not quantized: it was put in after qvit\.quantize"
    with pytest.raises(UnsupportedModelError, match=named):
        calibrate(student, [images])
    for guided in (True, False):
        for wrapped in (student, nn.Sequential(student)):
            with pytest.raises(UnsupportedModelError, match=named):
                DistillationLoss(vit, guided=guided)(wrapped, images, labels)
    with pytest.raises(UnsupportedModelError, match=part):
        qvit.export(student, tmp_path / "m.safetensors", preprocessing={"input_size": [3, 16, 16]}, classes=[])


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "vit_relpos_small_patch16_224"])
def test_constants_of_a_student_are_no_float_parts(name: str) -> None:
    small: dict[str, Any] = {"img_size": 16, "num_classes": 4, "embed_dim": 16}
    if name.startswith("swin"):
        small |= {"patch_size": 4, "window_size": 2, "depths": (1, 1), "num_heads": (1, 1)}
    else:
        small |= {"patch_size": 4, "depth": 1, "num_heads": 2}
    student = quantize(timm.create_model(name, **small))
    calibrate(student, [torch.randn(4, 3, 16, 16)])


def test_float_student_is_nobodys_mistake(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    assert torch.isfinite(DistillationLoss(vit)(copy.deepcopy(vit).train(), images, labels))
