"""What is built before the first step: a float model, its shape, and the student."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer

from commands import run
from conftest import TEACHER
from qvit import DistillationLoss


def test_one_float_model_is_built_and_one_copied(
    tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: Counter[str] = Counter()
    build, deepcopy = VisionTransformer.__init__, copy.deepcopy

    def counted_build(self: VisionTransformer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        built[f"built on {self.cls_token.device}"] += 1

    def counted_copy(value: Any, memo: dict[int, Any] | None = None) -> Any:
        if isinstance(value, VisionTransformer) and memo is None:
            built[f"copied on {value.cls_token.device}"] += 1
        return deepcopy(value, memo)

    def stop(*args: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(VisionTransformer, "__init__", counted_build)
    monkeypatch.setattr(copy, "deepcopy", counted_copy)
    monkeypatch.setattr(DistillationLoss, "forward", stop)
    arguments = ["--bits", "4", "--teacher", teacher_file, "--data", "digits", "--out", tmp_path / "run", "--cpu"]
    changes = [part for change in (*TEACHER, "quantized.calibration_images=4") for part in ("--set", change)]
    assert run("train", "vit_tiny_patch16_224", *arguments, *changes).status == 130
    # Shapes: of the command's model, of the teacher's file, and of the student before images are read.
    assert built == {"built on cpu": 1, "copied on cpu": 1, "built on meta": 3, "copied on meta": 1}
