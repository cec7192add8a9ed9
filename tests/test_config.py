from __future__ import annotations

import dataclasses
import json

import pytest

from qvit import QuantConfig
from qvit.errors import ConfigError


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_from_two_to_eight_is_accepted(bits: int) -> None:
    config = QuantConfig(weight_bits=bits, activation_bits=bits, overrides={"blocks.0.*": bits})
    assert config.bits("blocks.1.attn.qkv") == (bits, bits)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", None, True])
@pytest.mark.parametrize("field", ["weight_bits", "activation_bits"])
def test_other_widths_are_refused_by_field(field: str, bits: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a whole number from 2 to 8") as caught:
        QuantConfig(**{field: bits})
    assert repr(bits) in str(caught.value)


@pytest.mark.parametrize("bits", [1, 9, (4, 9), (1, 4), [2, 10], (4, 4.0), True])
def test_override_widths_are_checked_and_name_the_pattern(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"overrides\['blocks\.0\.\*'\]"):
        QuantConfig(overrides={"blocks.0.*": bits})


@pytest.mark.parametrize("bits", [None, (4,), (4, 4, 4), 4.0])
def test_override_that_is_neither_number_nor_pair_is_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="An override is a number of bits or"):
        QuantConfig(overrides={"head": bits})


@pytest.mark.parametrize("rectifier", ["channel", "", "Head", 1, False])
def test_unknown_rectifier_is_refused(rectifier: object) -> None:
    with pytest.raises(ConfigError, match="rectifier must be") as caught:
        QuantConfig(rectifier=rectifier)
    assert repr(rectifier) in str(caught.value)


def test_defaults_are_four_bits_rectified_by_head() -> None:
    config = QuantConfig()
    assert (config.weight_bits, config.activation_bits, config.rectifier, dict(config.overrides)) == (4, 4, "head", {})


def test_last_matching_override_wins() -> None:
    config = QuantConfig(2, 3, overrides={"blocks.*": 8, "blocks.0.*": (5, 6), "*.mlp.fc2": 7})
    assert config.bits("blocks.0.attn.qkv") == (5, 6)
    assert config.bits("blocks.1.attn.qkv") == (8, 8)
    assert config.bits("blocks.0.mlp.fc2") == (7, 7)
    reordered = QuantConfig(2, 3, overrides={"blocks.0.*": (5, 6), "blocks.*": 8})
    assert reordered.bits("blocks.0.attn.qkv") == (8, 8)


def test_weight_and_activation_bits_are_told_apart() -> None:
    bits = QuantConfig(2, 6).bits("blocks.0.mlp.fc1")
    assert (bits.weight, bits.activation) == (2, 6)


ENDS = ("patch_embed.*", "head", "head_dist")


@pytest.mark.parametrize("edge", ["patch_embed.proj", "head", "head_dist"])
def test_edges_have_eight_bits_unless_a_pattern_names_them(edge: str) -> None:
    assert QuantConfig(2, 2).bits(edge, ENDS) == (8, 8)
    assert QuantConfig(2, 2, overrides={"blocks.*": 3}).bits(edge, ENDS) == (8, 8)
    assert QuantConfig(2, 2, overrides={edge: (3, 4)}).bits(edge, ENDS) == (3, 4)
    assert QuantConfig(2, 2, overrides={"*": 5}).bits(edge, ENDS) == (5, 5)


def test_edges_are_matched_by_whole_name() -> None:
    assert QuantConfig(2, 2).bits("blocks.0.head", ENDS) == (2, 2)
    assert QuantConfig(2, 2).bits("header", ENDS) == (2, 2)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(2, 8, rectifier=None),
        QuantConfig(3, 4, rectifier="token", overrides={"blocks.*": 8, "blocks.0.*": (2, 3), "head": 4}),
    ],
)
def test_round_trip_through_json_keeps_the_meaning(config: QuantConfig) -> None:
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert (again.weight_bits, again.activation_bits, again.rectifier) == (
        config.weight_bits,
        config.activation_bits,
        config.rectifier,
    )
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head", "patch_embed.proj"):
        assert again.bits(name) == config.bits(name)
    assert list(again.overrides) == list(config.overrides)  # their order decides which one wins


def test_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Unknown field 'weigth_bits'"):
        QuantConfig.from_dict({"weigth_bits": 4})


def test_from_dict_checks_values() -> None:
    with pytest.raises(ConfigError, match="weight_bits"):
        QuantConfig.from_dict({"weight_bits": 16})


def test_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().weight_bits = 2  # type: ignore[misc]
