"""What is no float model of timm's, or no whole student: refused, with what to do."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

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


class OwnGelu(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Twice(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


def own_activation(vit: Any) -> None:
    vit.blocks[0].mlp.act = OwnGelu()


def blocks_twice(vit: Any) -> None:
    vit.blocks = Twice(*vit.blocks)


def own_forward(vit: Any) -> None:
    before = vit.blocks[1].forward
    vit.blocks[1].forward = lambda x: 2 * before(x)


def own_method(vit: Any) -> None:
    vit._pos_embed = types.MethodType(lambda model, x: type(model)._pos_embed(model, -x), vit)


def own_attention(vit: Any) -> None:
    vit.blocks[0].attn.forward = vit.blocks[1].attn.forward


def block_twice(vit: Any) -> None:
    vit.blocks[1] = vit.blocks[0]


def layer_twice(vit: Any) -> None:
    vit.blocks[1].mlp.fc1 = vit.blocks[0].mlp.fc1


EXCHANGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda vit: vit.blocks[1].register_forward_hook(lambda *_: None), r"blocks\.1 \(Block\): .*forward hook"),
    "hook before": (lambda vit: vit.register_forward_pre_hook(lambda *_: None), r"the model \(.*forward hook"),
    "forward": (own_forward, r"blocks\.1 \(Block\): its forward was exchanged for another function"),
    "method": (own_method, r"the model \(VisionTransformer\): its _pos_embed was exchanged"),
    "attention": (own_attention, r"blocks\.0\.attn \(Attention\): its forward was exchanged"),
    "activation": (own_activation, r"blocks\.0\.mlp\.act \(OwnGelu\): a packed file knows the activations"),
    "blocks": (blocks_twice, r"blocks \(Twice\): it stands where timm computes nothing"),
    "block twice": (block_twice, r"blocks\.1\.attn \(Attention\): it is the same module as blocks\.0\.attn"),
    "layer twice": (layer_twice, r"blocks\.1\.mlp\.fc1 \(Linear\): it is the same module as blocks\.0\.mlp\.fc1"),
    "weight norm": (lambda vit: weight_norm(vit.blocks[0].mlp.fc1), r"blocks\.0\.mlp\.fc1 .*its weight is computed"),
    "pruned": (lambda vit: prune.random_unstructured(vit.head, "weight", 0.5), r"head .*its weight is computed"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", EXCHANGED)
def test_model_that_computes_otherwise_than_its_classes_is_refused_by_name(vit: nn.Module, kind: str) -> None:
    change, sentence = EXCHANGED[kind]
    change(vit)
    with pytest.raises(UnsupportedModelError, match=sentence):
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
