"""Whatever looks at a model puts every module back in the mode that it found it in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qvit import QuantConfig, calibrate, quantize
from qvit.analysis.statistics import attention_distance, query_key_statistics
from qvit.data.loader import Batch
from qvit.errors import DataError
from qvit.nn.modes import evaluating
from qvit.nn.quantizer import Quantizer
from qvit.nn.rectifier import Rectifier
from qvit.train.evaluate import evaluate


class BrokenError(Exception):
    pass


def mixed(vit: nn.Module, images: Tensor) -> nn.Module:
    """Return a calibrated student in training, but for one frozen block and one quantizer that is switched off."""
    student = quantize(vit, QuantConfig(4, 4))
    calibrate(student, [images])
    student.blocks[1].eval()
    student.blocks[0].mlp.fc2.input_quantizer.enabled = False
    student.blocks[0].attn.key_rectifier.enabled = False
    return student


def modes(model: nn.Module) -> list[tuple[str, bool, bool]]:
    return [(name, m.training, getattr(m, "enabled", True)) for name, m in model.named_modules()]


LOOKS = {
    "calibrate": lambda vit, student, images: calibrate(student, [images]),
    "query_key_statistics": lambda vit, student, images: query_key_statistics(student, [images]),
    "attention_distance": lambda vit, student, images: attention_distance(vit, student, [images]),
    "evaluate": lambda vit, student, images: evaluate(
        student,
        DataLoader([0], collate_fn=lambda _: Batch(images, torch.zeros(len(images), dtype=torch.long), [], [])),
        torch.device("cpu"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("look", LOOKS)
def test_every_module_is_left_as_it_was_found(vit: nn.Module, images: Tensor, look: str, fails: bool) -> None:
    student = mixed(vit, images)
    vit.train()
    vit.blocks[0].eval()
    before = modes(vit), modes(student)

    def fail(*args: object) -> None:
        raise BrokenError

    if fails:
        handle = student.norm.register_forward_pre_hook(fail)
        with pytest.raises(BrokenError):
            LOOKS[look](vit, student, images)
        handle.remove()
    else:
        LOOKS[look](vit, student, images)
    assert (modes(vit), modes(student)) == before


def test_models_are_in_evaluation_meanwhile(vit: nn.Module) -> None:
    vit.train()
    with evaluating(vit):
        assert not any(module.training for module in vit.modules())
    assert all(module.training for module in vit.modules())


@pytest.mark.parametrize("where", ["patch_embed", "blocks.1.attn.attention_quantizer", "norm"])
def test_calibration_that_fails_changes_no_scale(vit: nn.Module, images: Tensor, where: str) -> None:
    student = quantize(vit, QuantConfig(4, 4))
    calibrate(student, [images])
    modules = [m for m in student.modules() if isinstance(m, (Quantizer, Rectifier))]
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def fail(*args: object) -> None:
        raise BrokenError

    handle = student.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        calibrate(student, [2 * images])
    handle.remove()
    with torch.no_grad():  # found when the first quantizers have new scales already
        weight = student.blocks[1].mlp.fc1.weight
        value = weight[0, 0].clone()
        weight[0, 0] = float("nan")
        with pytest.raises(DataError, match="NaN"):
            calibrate(student, [2 * images])
        weight[0, 0] = value
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(getattr(module, "calibrated", True) for module in modules)
