"""A checkpoint is read whole or refused in one sentence, whatever was dropped, retyped, resized or renamed in it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edits import NONSENSE, edited, places
from qvit import QuantConfig, calibrate, quantize
from qvit.errors import CheckpointError, QvitError
from qvit.models.checkpoint import VERSION, build, load_checkpoint, parts_of, read_checkpoint, write_checkpoint
from qvit.models.float_models import load_float
from qvit.models.spec import ModelSpec, create_model, describe

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1}


def contents() -> dict[str, Any]:
    """Return what a quantized checkpoint holds."""
    config = QuantConfig(3, 4, overrides={"blocks.0.mlp.*": (2, 5)})
    spec = describe(VIT, ARGS, ["a", "b"], {})
    student = quantize(create_model(spec), config)
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    spec = dataclasses.replace(
        spec,
        quant_config=config.to_dict(),
        method="q-vit",
        metrics={"val_top1": 50.0, "val_top5": 100.0, "val_images": 4},
        recipe={"quantized": {"epochs": 2, "optimizer_args": {"betas": [0.9, 0.99]}}},
    )
    weights = dict(student.state_dict())
    return {"format": "qvit-checkpoint", "version": VERSION, "spec": dataclasses.asdict(spec), "weights": weights,
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
@example(("version",), "resize", 10**400)
@example(("spec", "model_args", "mlp_ratio"), "resize", 10**400)
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
    spec, weights, _ = parts_of(CONTENTS, "x.pt")
    build(spec, weights, "x.pt")
    for name, value in weights.items():
        if name.endswith("code_bits"):
            continue
        spoilt = dict(weights)
        if how == "drop":
            del spoilt[name]
        else:
            spoilt[name] = torch.cat([value.flatten()] * 2) if how == "resize" else torch.full_like(value, math.nan)
        with pytest.raises(CheckpointError, match=f"x.pt does not fit {VIT}: {name} "):
            build(spec, spoilt, "x.pt")


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
    spec, weights, _ = parts_of(CONTENTS, "x.pt")
    with pytest.raises(CheckpointError, match=f"{name} .*{why}"):
        build(spec, {**weights, name: torch.full_like(weights[name], value)}, "x.pt")


@pytest.mark.parametrize(("version", "said"), [
    (VERSION + 1, "has checkpoint version 4, this qvit reads up to 3: update qvit"),
    (10**18, "update qvit"), (0, "was edited or damaged: its version"), (-1, "its version"), (None, "its version"),
    ("2", "its version"), (2.0, "its version"), (True, "its version"),
])  # fmt: skip
def test_version_is_newer_older_or_none(tmp_path: Path, version: Any, said: str) -> None:
    torch.save({**CONTENTS, "version": version, "spec": {"field": "of later"}}, tmp_path / "c.pt")
    for read in (read_checkpoint, load_checkpoint, lambda path: load_float(path, spec_of(), print)):
        with pytest.raises(CheckpointError, match=said) as caught:
            read(tmp_path / "c.pt")
        assert ("damaged" in str(caught.value)) == ("update" not in said)


@pytest.mark.parametrize("version", range(1, VERSION))
def test_older_version_is_read(tmp_path: Path, version: int) -> None:
    written = {**CONTENTS, "version": version}
    card = written.pop("spec")
    config = dict(card["quant_config"])
    config["rectify"] = config.pop("rectifier")
    torch.save({**written, "card": {**card, "quant_config": config}}, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt")[1] == spec_of()


@pytest.mark.parametrize("card", [None, 1, [], {}, {"quant_config": None}, {"quant_config": [1]}])
def test_older_version_without_a_card_is_refused(tmp_path: Path, card: Any) -> None:
    torch.save({**CONTENTS, "version": 2, "card": card}, tmp_path / "c.pt")
    said = said_of(tmp_path / "c.pt")
    assert said is not None
    assert "was edited or damaged" in said


def spec_of() -> ModelSpec:
    return ModelSpec.read(CONTENTS["spec"])


def test_spec_that_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.pt", spec_of(), CONTENTS["weights"], {"progress": {}})
    assert read_checkpoint(tmp_path / "c.pt")[0] == spec_of()


def test_work_is_bounded_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that describes a large model is refused before the model is built."""
    large = {**ARGS, "depth": 100, "embed_dim": 1024, "img_size": 64}
    spec = {**CONTENTS["spec"], "model_args": large}
    spec["preprocessing"] = {**spec["preprocessing"], "input_size": [3, 64, 64]}
    torch.save({**CONTENTS, "spec": spec}, tmp_path / "c.pt")
    monkeypatch.setattr("qvit.models.checkpoint.instantiate", lambda spec: pytest.fail("a model was built"))
    with pytest.raises(CheckpointError, match=r"cls_token has shape \(1, 1, 8\), the model needs \(1, 1, 1024\)"):
        load_checkpoint(tmp_path / "c.pt")
