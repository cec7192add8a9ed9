"""A student that was changed after ``qvit.quantize``: no file is written of what it computes no more."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize, prune

import qvit
from members import preprocessing
from qvit import DistillationLoss, QuantConfig
from qvit.analysis.attention_range import attention_grids
from qvit.analysis.size import operations
from qvit.errors import UnsupportedModelError
from qvit.format.packed import read_packed
from qvit.nn.attention import QuantSelfAttention
from qvit.nn.linear import QuantLinear
from qvit.nn.quantizer import Quantizer
from qvit.quantization.reconstruct import reconstruct


class DoubledLayer(QuantLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledAttention(QuantSelfAttention):
    def project(self, out: Tensor) -> Tensor:
        return 2 * super().project(out)


class DoubledQuantizer(Quantizer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def put(path: str, value: Callable[[Any], Any] | Any) -> Callable[[nn.Module], None]:
    """Return what sets an attribute of a student, by a path, to ``value``, or to what that makes of the student."""

    def change(student: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(student.get_submodule(owner), name, value(student) if type(value) is type(put) else value)

    return change


def hook(path: str, *, before: bool = False) -> Callable[[nn.Module], None]:
    def change(student: nn.Module) -> None:
        module = student.get_submodule(path)
        if before:
            module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            module.register_forward_hook(lambda module, args, output: 2 * output)

    return change


def part(path: str) -> Callable[[Any], nn.Module]:
    return lambda student: student.get_submodule(path)


def copied(path: str) -> Callable[[Any], nn.Module]:
    return lambda student: copy.deepcopy(student.get_submodule(path))


MLP, ATTENTION = "blocks.0.mlp", "blocks.1.attn"
OF_COMPUTING: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (hook("blocks.1"), r"blocks\.1 \(Block\): it has a forward hook"),
    "hook of the model": (hook(""), r"the model \(VisionTransformer\): it has a forward hook"),
    "hook before a quantizer": (hook(f"{ATTENTION}.key_quantizer", before=True), r"attn\.key_quantizer .*forward hook"),
    "hook of a rectifier": (hook(f"{ATTENTION}.key_rectifier"), r"key_rectifier .*forward hook"),
    "forward": (put("blocks.0.forward", lambda _: torch.neg), r"blocks\.0 \(Block\): its forward was exchanged"),
    "method": (put(f"{ATTENTION}.attend", lambda _: max), r"blocks\.1\.attn .*its attend was exchanged"),
    "pooling": (put("pool", lambda _: torch.sum), r"the model .*its pool was exchanged"),
    "block twice": (put("blocks.1", part("blocks.0")), r"blocks\.1\.attn .*the same module as blocks\.0\.attn"),
    "layer twice": (put("blocks.1.mlp.fc1", part(f"{MLP}.fc1")), r"the same module as blocks\.0\.mlp\.fc1"),
    "pruned": (lambda s: prune.random_unstructured(s.head, "weight", 0.5), r"head .*its weight is computed"),
    "parametrized": (
        lambda s: parametrize.register_parametrization(s.blocks[0].mlp.fc2, "weight", Negative()),
        r"blocks\.0\.mlp\.fc2 .*its weight is computed",
    ),
    "dropout": (put(f"{MLP}.drop1", Negative()), r"mlp\.drop1 \(Negative\): it stands where timm computes nothing"),
    "activation": (put(f"{MLP}.act", Negative()), r"mlp\.act \(Negative\): a packed file knows the activations"),
    "prefix tokens": (put("num_prefix_tokens", 2), r"the model .*its num_prefix_tokens is 2, and it has 1 of them"),
    "another module": (put("extra", Negative()), r"extra \(Negative\): it stands where timm computes nothing"),
}
"""Changes that even the program of an uncalibrated student shows, and the sentence about each."""
OF_QUANTIZERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "class of a layer": (put(f"{MLP}.fc1.__class__", DoubledLayer), r"fc1 \(DoubledLayer\): it may compute otherwise"),
    "class of an attention": (put(f"{ATTENTION}.__class__", DoubledAttention), r"blocks\.1\.attn \(DoubledAttention\)"),
    "class of a quantizer": (
        put(f"{ATTENTION}.value_quantizer.__class__", DoubledQuantizer),
        r"value_quantizer \(DoubledQuantizer\): it is not as qvit\.quantize makes it",
    ),
    "no quantizer": (put(f"{MLP}.fc1.weight_quantizer", nn.Identity()), r"fc1\.weight_quantizer \(Identity\)"),
    "quantizer of another kind": (
        put(f"{ATTENTION}.attention_quantizer", copied(f"{ATTENTION}.query_quantizer")),
        r"attention_quantizer .*not as .* \(4 bits, unsigned, scales=2, offset=False, codes from 0 to 15\)",
    ),
    "scales for heads": (
        put(f"{MLP}.fc2.input_quantizer", copied(f"{ATTENTION}.query_quantizer")),
        r"fc2\.input_quantizer .*scales=1, offset=True",
    ),
    "range of codes": (put(f"{MLP}.fc1.weight_quantizer.low", -7), r"fc1\.weight_quantizer .*codes from -8 to 7"),
    "rectifier off": (put(f"{ATTENTION}.query_rectifier.enabled", False), r"query_rectifier .*it is switched off"),
    "rectifier": (put(f"{ATTENTION}.key_rectifier", Negative()), r"it is no rectifier of qvit's, or another than"),
}
"""Changes of what alone a file of a calibrated student tells."""


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    """Return a calibrated student; copy it."""
    from conftest import make_vit

    student: nn.Module = qvit.quantize(make_vit(), QuantConfig(4))
    qvit.calibrate(student, [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))])
    return student


@pytest.fixture
def student(whole: nn.Module) -> nn.Module:
    return copy.deepcopy(whole)


def files(student: nn.Module, folder: Path) -> list[Callable[[], Any]]:
    """Return what writes a file of a student."""
    writers: list[tuple[Any, str]] = [(qvit.export, "m.safetensors"), (qvit.save_checkpoint, "m.pt")]
    return [functools.partial(write, student, folder / n, preprocessing=preprocessing()) for write, n in writers]


@pytest.mark.parametrize("kind", [*OF_COMPUTING, *OF_QUANTIZERS])
def test_no_file_is_written_of_a_changed_student(student: nn.Module, tmp_path: Path, kind: str) -> None:
    change, sentence = {**OF_COMPUTING, **OF_QUANTIZERS}[kind]
    change(student)
    programs = [lambda: operations(student, 16), lambda: attention_grids(student, (16, 16))]
    for function in [*files(student, tmp_path), *(programs if kind in OF_COMPUTING else [])]:
        with pytest.raises(UnsupportedModelError, match=sentence):
            function()
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["register_module_forward_hook", "register_module_forward_pre_hook"])
def global_hook(request: pytest.FixtureRequest) -> Iterator[None]:
    handle = getattr(modules, request.param)(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("global_hook")
def test_hooks_of_all_modules_are_refused_too(student: nn.Module, vit: nn.Module, tmp_path: Path) -> None:
    for function in [*files(student, tmp_path), lambda: qvit.quantize(vit)]:
        with pytest.raises(UnsupportedModelError, match=r"the model .*a forward hook of all modules .*remove that"):
            function()


def test_hooks_may_look_on_until_a_student_is_exported(
    vit: nn.Module, images: Tensor, labels: Tensor, tmp_path
) -> None:
    student, seen = qvit.quantize(vit, QuantConfig(4)), set()
    handles = [
        student.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.add(path))
        for path in ("", "blocks.0", "blocks.1.norm1", f"{MLP}.fc1", f"{ATTENTION}.key_rectifier")
    ]
    qvit.calibrate(student, [images])
    for guided in (True, False):
        DistillationLoss(vit, guided=guided)(student.train(), images, labels).backward()
    reconstruct(student.eval(), vit, [images[:4]], steps=1)
    qvit.agreement(student, vit, [images])
    assert len(seen) == len(handles)
    for handle in handles:
        handle.remove()
    student.compile()  # in place: what it computes is the same
    for write in files(student, tmp_path):
        write()
    assert read_packed(tmp_path / "m.safetensors").program.classifies
