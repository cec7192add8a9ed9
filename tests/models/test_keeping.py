"""A model of one's own loop becomes a checkpoint: the file that training writes, whatever the model is."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group

import qvit
from commands import run
from members import FAMILIES, MEMBERS, SIZES, SMALL, images_for, preprocessing, student_of, vary
from qvit import QuantConfig
from qvit.errors import CheckpointError, ConfigError, QvitError, UncalibratedError, UnsupportedModelError
from qvit.exporting.packed import export_checkpoint
from qvit.models.checkpoint import read_checkpoint
from qvit.models.families import image_size_of
from qvit.models.spec import same_architecture
from qvit.train.distributed import shard
from qvit.train.methods import FloatModel

KINDS = {name: (kind, {**SMALL, **arguments}) for name, (kind, arguments) in MEMBERS.items()}
KINDS |= {name: member for family in FAMILIES.values() for name, member in family.items()}
IMAGES = preprocessing()

configs = st.builds(
    QuantConfig,
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from(["head", "token", None]),
    st.sampled_from([{}, {"*.qkv": 8}, {"*_quantizer": (3, 5), "patch_embed.proj": 4}]),
)


def saved(model: nn.Module, folder: str | Path, **options: Any) -> Path:
    path = Path(folder) / "own.pt"
    qvit.save_checkpoint(model, path, **{"preprocessing": IMAGES, **options})
    return path


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(KINDS)), configs, st.booleans())
def test_what_is_kept_is_the_model(kind: str, config: QuantConfig, quantized: bool) -> None:
    name, arguments = KINDS[kind]
    torch.manual_seed(0)
    model: Any = vary(timm.create_model(name, **{"num_classes": 3, "proj_drop_rate": 0.1, **arguments})).eval()
    size = SIZES.get(kind) or image_size_of(model)
    images = images_for(model.in_chans, size)
    if quantized:
        config = QuantConfig(config.weight_bits, config.activation_bits, config.rectifier) if "eva" in kind else config
        model = student_of(model, images, config)
    with tempfile.TemporaryDirectory() as folder:
        if any(isinstance(value, type) or callable(value) for value in arguments.values()):
            with pytest.raises(ConfigError, match=r"No checkpoint can hold how timm\.create_model made this"):
                saved(model, folder, preprocessing=preprocessing((model.in_chans, *size)))
            return
        path = saved(model, folder, preprocessing=preprocessing((model.in_chans, *size)))
        loaded, spec = qvit.load_checkpoint(path)
        assert torch.equal(loaded(images), model(images))
        assert spec.quant_config == (config.to_dict() if quantized else None)
        assert spec.model_args["proj_drop_rate"] == 0.1  # for going on with it
        before = read_checkpoint(path)
        assert before[2] is None
        saved(loaded, folder, preprocessing=spec.preprocessing, classes=spec.classes, replace=True)
        after = read_checkpoint(path)
        assert after[0] == before[0]
        assert all(torch.equal(value, before[1][name]) for name, value in after[1].items())
        if quantized:
            export_checkpoint(path, Path(folder) / "kept.safetensors")
            qvit.export(model, Path(folder) / "own.safetensors", preprocessing=spec.preprocessing)
            logits = [qvit.load(file)(images.numpy()) for file in sorted(Path(folder).glob("*.safetensors"))]
            assert (logits[0] == logits[1]).all()


def test_it_is_the_file_that_training_writes(teacher_file: Path, tmp_path: Path) -> None:
    model, spec = qvit.load_checkpoint(teacher_file)
    path = saved(model, tmp_path, preprocessing=spec.preprocessing, classes=spec.classes)
    contents = [torch.load(file, weights_only=True) for file in (teacher_file, path)]
    assert [list(content) for content in contents] == [list(contents[0])] * 2
    assert [list(content["spec"]) for content in contents] == [list(contents[0]["spec"])] * 2
    assert [list(content["weights"]) for content in contents] == [list(contents[0]["weights"])] * 2
    _, again = qvit.load_checkpoint(path)
    assert same_architecture(again, spec)
    for what in ("name", "classes", "preprocessing", "quant_config", "method"):
        assert getattr(again, what) == getattr(spec, what)


def test_changes_that_timm_notes_are_kept(images: Tensor, tmp_path: Path) -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "img_size": 32})
    model.set_input_size(img_size=16)
    model.reset_classifier(3, global_pool="avg")
    loaded, spec = qvit.load_checkpoint(saved(model, tmp_path, classes=["a", "b", "c"]))
    assert torch.equal(loaded(images), model.eval()(images))
    assert spec.classes == ["a", "b", "c"]


def test_every_command_takes_it(teacher: FloatModel, teacher_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    student = qvit.quantize(teacher.model, QuantConfig(3, 3, rectifier=None))
    qvit.calibrate(student, [torch.randn(8, 1, 8, 8)])
    spec = teacher.spec
    path = saved(student, tmp_path, preprocessing=spec.preprocessing, classes=spec.classes)
    data = ["--data", "digits", "--cpu"]
    monkeypatch.setattr("qvit.study.analysis_report.svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr("qvit.study.analysis_report.png", lambda figure: b"")
    for command in (
        ["eval", path, *data],
        ["compare", teacher_file, path, *data],
        ["analyze", teacher_file, path, *data, "--out", tmp_path / "analysis", "--blocks", "0", "--study-images", "0"],
        ["complexity", path],
        ["export", path, tmp_path / "own.safetensors"],
    ):
        done = run(*command)
        assert done.status == 0, done


def changed(model: Any) -> Any:
    model.blocks[1].attn.scale = 0.5
    return model


def shortened(model: Any) -> Any:
    model.blocks = model.blocks[:1]
    return model


def overflowed(model: Any) -> Any:
    with torch.no_grad():
        model.norm.bias[3] = torch.inf
    return model


def extended(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.__class__ = type("Extended", (VisionTransformer,), {})
    return other


REFUSED: dict[str, tuple[Callable[[Any], nn.Module], type[QvitError], str]] = {
    "DataParallel": (nn.DataParallel, UnsupportedModelError, r"a VisionTransformer is inside it; give model\.module\."),
    "compiled": (torch.compile, UnsupportedModelError, r"is inside it; give model\._orig_mod\."),
    "averaged": (ModelEmaV3, UnsupportedModelError, r"is inside it; give model\.module\."),
    "module": (lambda model: nn.ModuleDict({"student": model}), UnsupportedModelError, r"give model\.student\."),
    "extended": (extended, UnsupportedModelError, "may compute otherwise than the class of timm's that it extends"),
    "other": (lambda model: nn.Linear(2, 2), UnsupportedModelError, "it is a model and not timm's"),
    "changed": (changed, UnsupportedModelError, r"from operation 5 on, 'residual', it is not what timm\.create_model"),
    "shortened": (shortened, UnsupportedModelError, "from operation 5 on, 'norm', it is not what"),
    "overflowed": (overflowed, CheckpointError, r"norm\.bias holds a NaN or an infinity"),
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_checkpoint_can_hold_is_refused(
    vit: nn.Module, images: Tensor, tmp_path: Path, kind: str, quantized: bool
) -> None:
    spoil, error, sentence = REFUSED[kind]
    with pytest.raises(error, match=sentence) as caught:
        saved(spoil(student_of(vit, images, QuantConfig()) if quantized else vit), tmp_path)
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_export_says_the_same_of_a_wrapper(vit: nn.Module, images: Tensor, tmp_path: Path, wrap: Any) -> None:
    student = wrap(student_of(vit, images, QuantConfig()))
    with pytest.raises(UnsupportedModelError, match=r"Cannot export the model .* a VisionTransformer is inside it"):
        qvit.export(student, tmp_path / "own.safetensors", preprocessing=IMAGES)


def test_sharded_model_is_refused(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    student = student_of(vit, images, QuantConfig())
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        shard(student)
        with pytest.raises(UnsupportedModelError, match=r"its weights are sharded \(FSDP\)"):
            saved(student, tmp_path)
    finally:
        destroy_process_group()


def test_model_that_nobody_knows_how_to_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"nothing tells how it was built; timm\.create_model notes that"):
        saved(VisionTransformer(**SMALL), tmp_path)


def test_student_without_scales_is_refused(vit: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UncalibratedError, match=r"input_quantizer has no scale yet: call qvit\.calibrate"):
        saved(qvit.quantize(vit), tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"classes": ["a"]}, "classes has 1 names, the model has 10 logits"),
        ({"preprocessing": {**IMAGES, "input_size": (3, 32, 32)}}, "32"),
        ({"preprocessing": {**IMAGES, "input_size": (1, 16, 16)}}, "input_size"),
        ({"preprocessing": {}}, "input_size must be channels, height and width"),
        ({"preprocessing": {**IMAGES, "std": 0.5}}, "preprocessing.std must be 3 numbers"),
    ],
)
def test_what_does_not_fit_the_model_is_named(vit: nn.Module, tmp_path: Path, options: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        saved(vit, tmp_path, **options)


def test_nothing_is_replaced_unasked(vit: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "own.pt").write_text("mine")
    with pytest.raises(ConfigError, match=r"own\.pt is there already: give another name, or replace=True\."):
        saved(vit, tmp_path)
    assert (tmp_path / "own.pt").read_text() == "mine"
    saved(vit, tmp_path, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]
    qvit.load_checkpoint(tmp_path / "own.pt")


def test_the_guides_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n((?:(?!```).)*save_checkpoint.*?)```", guide, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["spec"].classes == ["cat", "dog", "horse"]
