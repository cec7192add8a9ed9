"""What a file or a recipe may say of a model: arguments of timm's models, by name, type and size.

``timm.create_model`` takes more than what describes a model: files to open, addresses to fetch, classes to call. Only
what stands here reaches it, whoever wrote the checkpoint, the recipe or the ``config.json``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qvit.errors import ConfigError
from qvit.format.fields import shown

MAX_DEPTH, MAX_HEADS, MAX_SIDE, MAX_WIDTH = 128, 256, 4096, 16_384
"""Blocks, heads, pixels of a side, and channels of a model; of timm's own the largest have 48, 24, 896 and 3072."""
MAX_CHANNELS, MAX_STAGES = 1024, 8


class _Rule(NamedTuple):
    """What an argument must be: in words, and whether a value is it."""

    meaning: str
    holds: Callable[[Any], bool]


def _whole(least: int, most: int) -> _Rule:
    return _Rule(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _number(least: float, most: float) -> _Rule:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most

    return _Rule(f"a number from {least:g} to {most:g}", holds)


def _sides(most: int) -> _Rule:
    side = _whole(1, most)

    def holds(value: Any) -> bool:
        pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(side.holds, value))
        return pair or side.holds(value)

    return _Rule(f"{side.meaning}, or two of them for height and width", holds)


def _or_by_stage(rule: _Rule, most: int = 2**31) -> _Rule:
    def holds(value: Any) -> bool:
        stages = isinstance(value, (list, tuple)) and 0 < len(value) <= MAX_STAGES and all(map(rule.holds, value))
        return (stages and sum(value) <= most) or rule.holds(value)

    return _Rule(f"{rule.meaning}, or one for each of at most {MAX_STAGES} stages", holds)


def _choice(*names: str) -> _Rule:
    return _Rule(f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names)


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.meaning}, or none", lambda value: value is None or rule.holds(value))


_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_FRACTION = _number(0, 0.99)
_NORM = _or_none(_choice("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32"))

ARGUMENTS: Mapping[str, _Rule] = {
    "img_size": _sides(MAX_SIDE),
    "patch_size": _sides(MAX_SIDE),
    "in_chans": _whole(1, MAX_CHANNELS),
    "global_pool": _choice("token", "avg", "avgmax", "max", "map", ""),
    "embed_dim": _whole(1, MAX_WIDTH),
    "depth": _whole(1, MAX_DEPTH),
    "num_heads": _or_by_stage(_whole(1, MAX_HEADS)),
    "mlp_ratio": _number(0.01, 64),
    "qkv_bias": _FLAG,
    "qk_norm": _FLAG,
    "scale_attn_norm": _FLAG,
    "scale_mlp_norm": _FLAG,
    "proj_bias": _FLAG,
    "init_values": _or_none(_number(0, 1000)),
    "class_token": _FLAG,
    "pos_embed": _choice("learn", "none", ""),
    "no_embed_class": _FLAG,
    "reg_tokens": _whole(0, 1024),
    "pre_norm": _FLAG,
    "final_norm": _FLAG,
    "fc_norm": _or_none(_FLAG),
    "pool_include_prefix": _FLAG,
    "dynamic_img_size": _FLAG,
    "dynamic_img_pad": _FLAG,
    "drop_rate": _FRACTION,
    "pos_drop_rate": _FRACTION,
    "patch_drop_rate": _FRACTION,
    "proj_drop_rate": _FRACTION,
    "attn_drop_rate": _FRACTION,
    "drop_path_rate": _FRACTION,
    "weight_init": _choice("skip", "reset", "jax", "jax_nlhb", "moco", ""),
    "fix_init": _FLAG,
    "norm_layer": _NORM,
    "embed_norm_layer": _NORM,
    "act_layer": _or_none(_choice("gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "relu")),
    # Swin
    "depths": _or_by_stage(_whole(1, MAX_DEPTH), most=MAX_DEPTH),
    "head_dim": _or_none(_whole(1, MAX_WIDTH)),
    "window_size": _sides(MAX_SIDE),
    "always_partition": _FLAG,
    "strict_img_size": _FLAG,
    "pretrained_window_sizes": _or_by_stage(_whole(0, MAX_SIDE)),
    "window_ratio": _or_by_stage(_whole(1, MAX_SIDE)),
    "extra_norm_period": _whole(0, MAX_DEPTH),
    "extra_norm_stage": _FLAG,
    "sequential_attn": _FLAG,
    # BEiT
    "swiglu_mlp": _FLAG,
    "scale_mlp": _FLAG,
    "use_abs_pos_emb": _FLAG,
    "use_rel_pos_bias": _FLAG,
    "use_shared_rel_pos_bias": _FLAG,
    "use_fc_norm": _or_none(_FLAG),
    "head_init_scale": _number(0, 1000),
    # vit_relpos
    "rel_pos_type": _choice("mlp", "bias"),
    "rel_pos_dim": _or_none(_whole(1, MAX_WIDTH)),
    "shared_rel_pos": _FLAG,
    # EVA, DINOv3
    "num_kv_heads": _or_none(_or_by_stage(_whole(1, MAX_HEADS))),
    "qkv_fused": _FLAG,
    "swiglu_align_to": _whole(0, 1024),
    "scale_attn_inner": _FLAG,
    "attn_type": _choice("eva", "rope"),
    "attn_only_layer_scale": _FLAG,
    "num_reg_tokens": _whole(0, 1024),
    "use_rot_pos_emb": _FLAG,
    "rope_type": _or_none(_choice("cat", "mixed", "dinov3", "mrope", "")),
    "rope_grid_offset": _number(-1000, 1000),
    "rope_grid_indexing": _choice("ij", "xy"),
    "rope_temperature": _number(1, 1e6),
    "rope_rotate_half": _FLAG,
    "rope_shift_coords": _or_none(_number(0, 1000)),
    "rope_jitter_coords": _or_none(_number(0, 1000)),
    "rope_rescale_coords": _or_none(_number(0, 1000)),
    "rope_mrope_section": _or_none(_or_by_stage(_whole(0, MAX_WIDTH))),
    "use_post_norm": _FLAG,
    "use_pre_transformer_norm": _FLAG,
    "use_post_transformer_norm": _or_none(_FLAG),
    "attn_pool_num_heads": _or_none(_whole(1, MAX_HEADS)),
    "attn_pool_mlp_ratio": _or_none(_number(0.01, 64)),
    "ref_feat_shape": _or_none(_sides(MAX_SIDE)),
}
"""Those of timm's ``VisionTransformer``, and below them what other families add."""


def check_arguments(arguments: Any) -> None:
    """Refuse arguments of a model that are not in :data:`ARGUMENTS`, or not what they have to be.

    Raises:
        ConfigError: naming the argument.
    """
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"A model's arguments must be names and values, not {shown(arguments)}.")
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            near = difflib.get_close_matches(str(name)[:60], ARGUMENTS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "it may have what describes its shape, such as img_size."
            raise ConfigError(f"A model has no argument {shown(name)} here: {hint}")
        rule = ARGUMENTS[name]
        if not rule.holds(value):
            raise ConfigError(f"The model's argument {name} must be {rule.meaning}, not {shown(value)}.")
