"""Numbers of things that are 0, negative or not whole: refused in a sentence, by every function that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import qvit
from qvit.bench.compare import compare
from qvit.config import QuantConfig
from qvit.data.loader import make_loader
from qvit.data.pictures import open_pictures
from qvit.errors import ConfigError
from qvit.quantization import reconstruct
from qvit.search.find import check_budgets
from qvit.serving.app import make_app
from qvit.serving.batches import Batcher
from qvit.serving.server import make_engines
from qvit.study import analysis, comparison
from qvit.train.options import Options
from qvit.train.recipe import Hyperparameters


def analysed(**given: Any) -> object:
    return analysis.Request(**{"subjects": [], "reference": None, "source": "", "material": None, **given})


def trained(**given: Any) -> object:
    return Hyperparameters(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **given})


TAKERS: dict[str, Callable[[Path, Any], object]] = {
    "Engine threads": lambda file, n: qvit.load(file, threads=n),
    "Engine.predict top_k": lambda file, n: qvit.load(file, threads=1).predict([], top_k=n),
    "Engine.profile repeats": lambda file, n: qvit.load(file, threads=1).profile(np.zeros((1, 3, 16, 16)), repeats=n),
    "reconstruct steps": lambda file, n: reconstruct.Settings(steps=n),
    "reconstruct batch_size": lambda file, n: reconstruct.Settings(steps=1, batch_size=n),
    "QuantConfig weight_bits": lambda file, n: QuantConfig(n),
    "compare batches": lambda file, n: compare({"a": file}, [n], [1]),
    "compare threads": lambda file, n: compare({"a": file}, [1], [n]),
    "compare rounds": lambda file, n: compare({"a": file}, [1], [1], rounds=n),
    "analysis limit": lambda file, n: analysed(limit=n),
    "comparison batch_size": lambda file, n: comparison.Request(file, file, data="digits", batch_size=n),
    "comparison threads": lambda file, n: comparison.Request(file, file, data="digits", threads=n),
    "pictures to work with": lambda file, n: open_pictures(file.parent, "RGB", count=n, held_out=1),
    "pictures held out": lambda file, n: open_pictures(file.parent, "RGB", count=1, held_out=n),
    "serving top_k": lambda file, n: Batcher([], top_k=n, waiting=1),
    "serving waiting": lambda file, n: Batcher([], top_k=1, waiting=n),
    "serving largest_body": lambda file, n: make_app(SimpleNamespace(), largest_body=n),  # type: ignore[arg-type]
    "serving threads": lambda file, n: make_engines(file, n),
    "Options accumulate": lambda file, n: Options(file.parent, accumulate=n),
    "recipe epochs": lambda file, n: trained(epochs=n),
    "recipe calibration_images": lambda file, n: trained(calibration_images=n),
    "loader batch_size": lambda file, n: make_loader([], None, n, shuffle=False),  # type: ignore[arg-type]
}
FROM_ZERO: dict[str, Callable[[Path, Any], object]] = {
    "analysis study_images": lambda file, n: analysed(study_images=n),
    "Options seed": lambda file, n: Options(file.parent, seed=n),
    "Options workers": lambda file, n: Options(file.parent, workers=n),
    "recipe repeated_augmentation": lambda file, n: trained(repeated_augmentation=n),
}


@pytest.mark.parametrize("name", [*TAKERS, *FROM_ZERO])
def test_a_number_of_things_is_a_whole_one(packed_file: Path, name: str) -> None:
    for number in (*([0] if name in TAKERS else []), -1, 0.5, "1", True, float("nan")):
        with pytest.raises(ConfigError, match=rf"{name.split()[-1]}.* must be a whole number from \d+ .*, not "):
            {**TAKERS, **FROM_ZERO}[name](packed_file, number)


NUMBERS: dict[str, Callable[[Any], object]] = {
    "reconstruct minutes": lambda n: reconstruct.Settings(minutes=n),
    "reconstruct learning_rate": lambda n: reconstruct.Settings(steps=1, learning_rate=n),
    "search --budget-ms": lambda n: check_budgets({"ms": n}),
}
NUMBERS_FROM_ZERO: dict[str, Callable[[Any], object]] = {
    "loss guided_weight": lambda n: qvit.DistillationLoss(nn.Identity(), guided_weight=n),
    "recipe warmup_epochs": lambda n: trained(warmup_epochs=n),
}


@pytest.mark.parametrize("name", [*NUMBERS, *NUMBERS_FROM_ZERO])
def test_a_number_that_cannot_be_meant_is_none(name: str) -> None:
    for number in (*([0] if name in NUMBERS else []), -1, -(10**400), float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigError, match=rf"{name.split()[-1]} must be a number (above 0|from 0 up), not "):
            {**NUMBERS, **NUMBERS_FROM_ZERO}[name](number)


def test_engine_takes_numpys_whole_numbers_and_what_is_written_to_files_none(packed_file: Path) -> None:
    engine = qvit.load(packed_file, threads=np.int64(1))  # type: ignore[arg-type]
    assert engine.threads == 1
    with pytest.raises(ConfigError, match="epochs must be a whole number from 1 up, not a int64"):
        trained(epochs=np.int64(1))
    with pytest.raises(ConfigError, match="lr must be a number from 0 up, not a float32"):
        trained(lr=np.float32(0.1))
    assert engine.profile(np.zeros((1, 3, 16, 16), np.float32), repeats=np.int8(1))  # type: ignore[arg-type]
