"""What a checkpoint, a recipe or a config.json may say of a model: an allow-list, and bounds that hold at once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import VisionTransformer

from qvit.errors import CheckpointError, ConfigError, QvitError
from qvit.models.arguments import ARGUMENTS, check_arguments
from qvit.models.checkpoint import load_checkpoint, write_checkpoint
from qvit.models.families import FAMILIES
from qvit.models.float_models import load_float
from qvit.models.spec import ModelSpec, create_model, describe, same_architecture
from qvit.train.recipe import load_recipe

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


def spec() -> ModelSpec:
    return describe(VIT, ARGS, ["a", "b"], {})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Whatever a file says, nobody is asked."""
    asked: list[object] = []

    def connect(self: object, address: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: connect(None, address))
    yield asked
    assert asked == []


DANGEROUS: dict[str, Any] = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://example.org/weights.pth"},
    "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "pretrained_strict": False,
    "checkpoint_path": "/etc/passwd",
    "cache_dir": "/tmp",
    "hf_hub_id": "someone/something",
    "url": "http://example.org",
    "file": "/etc/passwd",
    "custom_load": True,
    "features_only": True,
    "out_indices": [0],
    "scriptable": True,
    "exportable": True,
    "num_classes": 5,
    "mlp_layer": "torch.nn.Linear",
    "block_fn": "x",
    "attn_layer": "diff",
    "embed_layer": "x",
    "device": "cuda",
    "dtype": "float16",
    "__class__": "x",
    "": 1,
}
IMPOSSIBLE: list[tuple[str, Any]] = [
    ("depth", 10**5), ("depth", 0), ("depth", -1), ("depth", 2.0), ("depth", True), ("depth", "2"), ("depth", None),
    ("patch_size", 0), ("patch_size", [4, 0]), ("patch_size", [4]), ("patch_size", 10**9), ("patch_size", 9),
    ("num_heads", 0), ("num_heads", 3), ("num_heads", 10**6), ("embed_dim", 10**9), ("embed_dim", 0),
    ("img_size", 10**6), ("img_size", 0), ("img_size", [8, 8, 8]), ("img_size", "8"), ("img_size", [4096, 4096]),
    ("mlp_ratio", 0), ("mlp_ratio", math.inf), ("mlp_ratio", math.nan), ("mlp_ratio", -4), ("mlp_ratio", 1e9),
    ("in_chans", 0), ("in_chans", 10**9), ("reg_tokens", -1), ("reg_tokens", 10**9), ("drop_rate", 1.5),
    ("drop_path_rate", "x"), ("init_values", math.nan), ("global_pool", "sum"), ("global_pool", 3), ("pos_embed", "x"),
    ("norm_layer", "os.system"), ("act_layer", "nothing"), ("act_layer", ["gelu"]), ("class_token", 1),
    ("fc_norm", "yes"), ("weight_init", "x"), ("class_token", False),
]  # fmt: skip


@pytest.mark.parametrize("name", DANGEROUS)
def test_what_does_not_describe_a_model_never_reaches_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_timm(*args: object, **kwargs: object) -> None:
        raise AssertionError("timm was asked")

    monkeypatch.setattr(timm, "create_model", no_timm)
    for arguments in ({name: DANGEROUS[name]}, {**ARGS, name: DANGEROUS[name]}):
        with pytest.raises(ConfigError, match="A model has no argument"):
            describe(VIT, arguments, ["a", "b"], {})


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_model_that_cannot_be_meant_is_refused_before_it_takes_memory(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = VisionTransformer.__init__

    def without_memory(self: VisionTransformer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        assert all(parameter.is_meta for parameter in self.parameters())

    monkeypatch.setattr(VisionTransformer, "__init__", without_memory)
    arguments = {**ARGS, name: value}
    with pytest.raises(ConfigError, match=r"^(vit_tiny|The model|timm)") as caught:
        create_model(dataclasses.replace(spec(), model_args=arguments))
    assert len(str(caught.value)) < 400


def test_model_of_too_many_weights_is_refused_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r"would have \d+ weights, the limit is 4000000000"):
        describe(VIT, {"depth": 2, "embed_dim": 16384, "num_heads": 2}, ["a", "b"], {})


@pytest.mark.parametrize("name", timm.list_models(module="vision_transformer")[::7])
def test_every_vision_transformer_of_timms_is_within_the_bounds(name: str) -> None:
    with torch.device("meta"):
        is_one = isinstance(timm.create_model(name), VisionTransformer)
    with nullcontext() if is_one else pytest.raises(ConfigError, match="qvit works on vision transformers"):
        describe(name, {}, ["a", "b"], {})


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(ARGUMENTS)), st.text(max_size=12)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=2),
            max_leaves=4,
        ),
        max_size=3,
    )
)
def test_arguments_pass_or_are_refused_in_a_sentence(arguments: dict[str, Any]) -> None:
    try:
        check_arguments(arguments)
        assert set(arguments) <= set(ARGUMENTS)
        describe(VIT, {**ARGS, **arguments}, ["a", "b"], {})
    except ConfigError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said
    assert len(said) < 400


def test_whatever_is_plain_of_a_familys_arguments_is_listed() -> None:
    names = "None|NoneType|Optional|Union|Tuple|Literal|bool|int|float|str"
    plain = re.compile(rf"^(typing\.|{names}|\.\.\.|'\w*'|[][ ,|])+$")
    for family in FAMILIES:
        for model in family.MODELS:
            for name, parameter in inspect.signature(model.__init__).parameters.items():
                kind = parameter.annotation
                text = kind.__name__ if isinstance(kind, type) else str(kind)
                if name != "num_classes" and plain.match(text):
                    assert name in ARGUMENTS, f"{name} of {model.__name__}"


def test_name_with_a_tag_says_where_the_weights_are_given() -> None:
    with pytest.raises(ConfigError, match=r"call the model vit_tiny_patch16_224, and give --teacher vit_tiny_patch16"):
        describe("vit_tiny_patch16_224.augreg_in21k", {}, ["a", "b"], {})


# --- wherever the arguments come from ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [*DANGEROUS.items(), ("depth", 10**5), ("patch_size", 0), ("num_heads", 0)])
def test_checkpoint_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    evil = dataclasses.replace(spec(), model_args={**ARGS, name: value})
    write_checkpoint(tmp_path / "evil.pt", evil, create_model(spec()))
    with pytest.raises(CheckpointError, match=r"evil\.pt was edited or damaged: "):
        load_checkpoint(tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt was edited or damaged: "):
        load_float(tmp_path / "evil.pt", spec(), print)


@pytest.mark.parametrize(("name", "value"), [("checkpoint_path", "/etc/passwd"), ("depth", 10**5), ("num_heads", 0)])
def test_recipe_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    from qvit.train.methods import open_images

    path = tmp_path / "recipe.yaml"
    hyperparameters = {"epochs": 1, "batch_size": 4, "lr": 0.1}
    recipe = {"model_args": {**ARGS, name: value}, "full_precision": hyperparameters, "quantized": hyperparameters}
    path.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match=name):
        open_images(VIT, load_recipe(str(path)), "digits")


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {"checkpoint_path": "/etc/passwd"}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}},
        {"model_args": {"depth": 10**5}},
        {"model_args": [1]},
        {"num_classes": -1},
        {"num_classes": "x"},
        {"label_names": ["a"]},
        {"global_pool": {"x": 1}},
        {"architecture": "resnet18"},
        {"architecture": "hf-hub:someone/something"},
        {"model_args": {"depth": 1}, "pretrained_cfg": {"input_size": [3, 10**9, 8]}},
        {"pretrained_cfg": {"mean": "x"}},
        {"pretrained_cfg": {"std": [0, 0, 0]}},
        {"pretrained_cfg": {"interpolation": "x", "crop_pct": [1]}},
    ],
)
def test_config_of_the_hub_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    config = {"architecture": VIT, "num_classes": 2, "model_args": ARGS, "pretrained_cfg": {}}
    save_file(create_model(spec()).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_float(tmp_path, spec(), print)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(QvitError, match=r"cannot be used as its config\.json describes it"):
        load_float(tmp_path, spec(), print)


def test_addresses_in_the_config_of_the_hub_are_not_followed(tmp_path: Path) -> None:
    model = create_model(spec())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings = {"url": "http://example.org/x.pth", "hf_hub_id": "a/b", "file": "/etc/passwd", "custom_load": True}
    config = {"architecture": VIT, "num_classes": 2, "model_args": ARGS, "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, _ = load_float(tmp_path, spec(), print)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(images), model.eval()(images))


# --- the same computation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 4},
        {"act_layer": "relu"},
        {"global_pool": "avg", "fc_norm": False},
        {"pool_include_prefix": True, "global_pool": "avg", "fc_norm": False},
        {"dynamic_img_size": True},
        {"norm_layer": "rmsnorm"},
        {"qk_norm": True},
    ],
)
def test_models_that_compute_otherwise_are_not_the_same(change: dict[str, Any]) -> None:
    assert not same_architecture(spec(), describe(VIT, {**ARGS, **change}, ["a", "b"], {}))
    avg = {**ARGS, "global_pool": "avg", "fc_norm": False}
    assert not same_architecture(
        describe(VIT, avg, ["a", "b"], {}), describe(VIT, {**avg, "pool_include_prefix": True}, ["a", "b"], {})
    )


def test_models_that_only_train_otherwise_are_the_same() -> None:
    other = describe("deit_base_patch16_224", {**ARGS, "drop_path_rate": 0.1, "weight_init": "jax"}, ["a", "b"], {})
    assert same_architecture(spec(), other)
