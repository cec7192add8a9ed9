"""A checkpoint is read whole or refused in one sentence, whatever was dropped, retyped, resized or renamed in it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edits import NONSENSE, edited, places
from qvit import QuantConfig, calibrate, quantize
from qvit.errors import CheckpointError, QvitError
from qvit.models.card import ModelCard, create_model, describe
from qvit.models.checkpoint import VERSION, build, load_checkpoint, parts_of, read_checkpoint, save_checkpoint
from qvit.models.float_models import load_float

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1}


def contents() -> dict[str, Any]:
    """Return what a quantized checkpoint holds."""
    config = QuantConfig(3, 4, overrides={"blocks.0.mlp.*": (2, 5)})
    card = describe(VIT, ARGS, ["a", "b"], {})
    student = quantize(create_model(card), config)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    card = dataclasses.replace(
        card,
        quant_config=config.to_dict(),
        method="q-vit",
        metrics={"val_top1": 50.0, "val_top5": 100.0, "val_images": 4},
        recipe={"quantized": {"epochs": 2, "optimizer_args": {"betas": [0.9, 0.99]}}},
    )
    weights = dict(student.state_dict())
    return {"format": "qvit-checkpoint", "version": VERSION, "card": dataclasses.asdict(card), "weights": weights,
            "training": None}  # fmt: skip


CONTENTS = contents()


def said_of(path: Path) -> str | None:
    """Return the sentence in which a checkpoint is refused, or nothing."""
    try:
        load_checkpoint(path)
    except QvitError as error:
        assert isinstance(error, CheckpointError)  # noqa: PT017
        text = str(error)
        assert text.isprintable(), repr(text)
        assert text.startswith(str(path))
        assert len(text) - len(str(path)) < 400
        return text
    return None


PLACES = list(places(CONTENTS))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from(["drop", "rename", "resize", "retype"]), st.sampled_from(NONSENSE))
def test_edited_checkpoint_is_refused_in_a_sentence(
    tmp_path_factory: Any, path: tuple[Any, ...], how: str, value: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "edited.pt"
    torch.save(edited(CONTENTS, path, how, value), file)
    said = said_of(file)
    if path[0] == "weights" and not (how == "drop" and str(path[-1]).endswith("code_bits")):
        assert said is not None


@pytest.mark.parametrize("how", ["drop", "resize", "nan"])
def test_every_single_weight_is_checked(how: str) -> None:
    card, weights, _ = parts_of(CONTENTS, "x.pt")
    build(card, weights, "x.pt")
    for name, value in weights.items():
        if name.endswith("code_bits"):
            continue
        spoilt = dict(weights)
        if how == "drop":
            del spoilt[name]
        else:
            spoilt[name] = torch.cat([value.flatten()] * 2) if how == "resize" else torch.full_like(value, math.nan)
        with pytest.raises(CheckpointError, match=f"x.pt does not fit {VIT}: {name} "):
            build(card, spoilt, "x.pt")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("head.input_quantizer.log_scale", 1000.0, "no usable scale"),
        ("head.input_quantizer.log_scale", -1000.0, "no usable scale"),
        ("head.weight_quantizer.log_scale", math.nan, "no usable scale: it is damaged, or was never calibrated"),
        ("blocks.0.attn.query_rectifier.running_var", -1.0, "holds a variance below 0"),
        ("blocks.0.attn.key_rectifier.gamma", 0.0, "holds a 0, by which a rectifier divides"),
        ("blocks.0.mlp.fc1.weight_quantizer.code_bits", 7, "is 7, the model is to have 2"),
    ],
)
def test_value_that_makes_no_logits_is_refused_by_name(name: str, value: float, why: str) -> None:
    card, weights, _ = parts_of(CONTENTS, "x.pt")
    with pytest.raises(CheckpointError, match=f"{name} .*{why}"):
        build(card, {**weights, name: torch.full_like(weights[name], value)}, "x.pt")


@pytest.mark.parametrize(("version", "said"), [
    (VERSION + 1, "has checkpoint version 3, this qvit reads up to 2: update qvit"),
    (10**18, "update qvit"), (0, "was edited or damaged: its version"), (-1, "its version"), (None, "its version"),
    ("2", "its version"), (2.0, "its version"), (True, "its version"),
])  # fmt: skip
def test_version_is_newer_older_or_none(tmp_path: Path, version: Any, said: str) -> None:
    torch.save({**CONTENTS, "version": version, "card": {"field": "of later"}}, tmp_path / "c.pt")
    for read in (read_checkpoint, load_checkpoint, lambda path: load_float(path, card_of(), print)):
        with pytest.raises(CheckpointError, match=said) as caught:
            read(tmp_path / "c.pt")
        assert ("damaged" in str(caught.value)) == ("update" not in said)


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_older_version_is_read(tmp_path: Path, version: int) -> None:
    torch.save({**CONTENTS, "version": version}, tmp_path / "c.pt")
    load_checkpoint(tmp_path / "c.pt")


def card_of() -> ModelCard:
    return ModelCard.read(CONTENTS["card"])


def test_card_that_is_written_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", card_of(), CONTENTS["weights"], {"progress": {}})
    assert read_checkpoint(tmp_path / "c.pt")[0] == card_of()


def test_work_is_bounded_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that describes a large model is refused before the model is built."""
    large = {**ARGS, "depth": 100, "embed_dim": 1024, "img_size": 64}
    card = {**CONTENTS["card"], "model_args": large}
    card["preprocessing"] = {**card["preprocessing"], "input_size": [3, 64, 64]}
    torch.save({**CONTENTS, "card": card}, tmp_path / "c.pt")
    monkeypatch.setattr("qvit.models.checkpoint.create_model", lambda card: pytest.fail("a model was built"))
    with pytest.raises(CheckpointError, match=r"cls_token has shape \(1, 1, 8\), the model needs \(1, 1, 1024\)"):
        load_checkpoint(tmp_path / "c.pt")
