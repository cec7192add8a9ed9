"""What the programs of several families begin and end with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import nn

from qvit.errors import ConfigError
from qvit.format.branches import Residual
from qvit.format.ops import Classify, Embed, Norm, Operation, Pool, Tokens
from qvit.models.attention import attention_pool
from qvit.models.lowering import Lowering, refuse, wide

ENDS = ("patch_embed.*", "head", "head_dist")
"""Layers that keep 8 bits in most families, by name: patch embedding and classifiers (docs/method.md, section 1)."""
POOLS = ("token", "avg", "avgmax", "max")


def embed(to: Lowering, kind: type[nn.Module] = PatchEmbed) -> Iterator[Operation]:
    """Yield a patch embedding of class ``kind`` and its norm.

    Raises:
        UnsupportedModelError: if its patches overlap or are padded.
        ConfigError: if the images have another size than the model.
    """
    module: Any = to.module("patch_embed")
    if kind not in (type(module),):  # not of a subclass
        refuse("patch_embed", module, "only timm's plain PatchEmbed is supported")
    proj = module.proj
    plain = (proj.stride, proj.padding, proj.dilation, proj.groups) == (proj.kernel_size, (0, 0), (1, 1), 1)
    if not plain or proj.kernel_size != tuple(module.patch_size):
        refuse("patch_embed.proj", proj, "its patches overlap or are padded")
    _check_image_size(to)
    yield Embed((int(module.patch_size[0]), int(module.patch_size[1])), to.layer("patch_embed.proj"))
    yield from norm(to, "patch_embed.norm")


def _check_image_size(to: Lowering) -> None:
    model, module = to.model, to.module("patch_embed")
    whole = not any(side % patch for side, patch in zip(to.image_size, module.patch_size, strict=True))
    if getattr(model, "dynamic_img_size", False):
        if not whole:
            raise ConfigError(
                f"preprocessing.input_size {to.image_size} must be whole patches of {tuple(module.patch_size)} pixels."
            )
    elif to.image_size != tuple(module.img_size):
        raise ConfigError(
            f"preprocessing.input_size {to.image_size} is not the model's image size {tuple(module.img_size)}."
        )
    elif not whole and getattr(module, "dynamic_img_pad", False):
        refuse(
            "patch_embed",
            module,
            f"it pads images of {to.image_size} pixels to whole patches, which a packed file cannot: make the model "
            "for another size, or without dynamic_img_pad",
        )


def grid(to: Lowering) -> tuple[int, int]:
    """Return rows and columns of patches."""
    rows, columns = (s // p for s, p in zip(to.image_size, to.module("patch_embed").patch_size, strict=True))
    return int(rows), int(columns)


def norm(to: Lowering, name: str) -> Iterator[Norm]:
    """Yield a norm, if it is one."""
    found = to.norm(name)
    if found is not None:
        yield found


def need_norms(block: nn.Module, name: str) -> None:
    """Refuse a block without the norms of its branches.

    Raises:
        UnsupportedModelError: naming the norm.
    """
    for part in ("norm1", "norm2"):
        if isinstance(getattr(block, part), nn.Identity):
            refuse(f"{name}.{part}", getattr(block, part), "a block needs its norms")


def tokens(to: Lowering, parts: Sequence[Any], positions: Any, covered: int) -> Tokens:
    """Return the prefix tokens, with their position embedding, and the patches' own.

    Args:
        to: takes the tensors.
        parts: parameters ``(1, n, width)`` in their order, or ``None`` where there is none.
        positions: the position embedding ``(1, covered + patches, width)``, or ``None``.
        covered: prefix tokens that have a position embedding.
    """
    model: Any = to.model
    present = [part for part in parts if part is not None]
    prefix = sum(part.shape[1] for part in present)
    if model.num_prefix_tokens != prefix:  # so many are left out of a mean over the patches
        refuse("the model", model, f"its num_prefix_tokens is {model.num_prefix_tokens}, and it has {prefix} of them")
    if positions is not None and positions.shape[1] != model.patch_embed.num_patches + covered:
        expected = model.patch_embed.num_patches + covered
        refuse("pos_embed", positions, f"it covers {positions.shape[1]} tokens of {expected}")

    def embedding() -> np.ndarray:
        if not getattr(model, "dynamic_img_size", False):
            return wide(positions)[0]
        size = list(model.patch_embed.grid_size)
        return wide(resample_abs_pos_embed(positions, list(grid(to)), size, num_prefix_tokens=covered))[0]

    def prefix_tokens() -> np.ndarray:
        values = np.concatenate([wide(part)[0] for part in present])
        if positions is not None:
            values[:covered] += embedding()[:covered]
        return values

    if prefix:
        to.store("prefix_tokens", prefix_tokens)
    if positions is not None:
        to.store("position_embedding", lambda: embedding()[covered:])
    return Tokens(prefix, positions is not None)


def blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of a plain stack, in the order they run."""
    return list(model.blocks)


def check_blocks_and_pool(model: Any) -> None:
    """Refuse a model without blocks, or whose pooling no packed file can say.

    Raises:
        UnsupportedModelError: naming the module.
    """
    if model.global_pool not in POOLS and getattr(model, "attn_pool", None) is None:
        refuse("the model", model, f"it pools by {model.global_pool!r}; a packed file knows {', '.join(POOLS)}, map")
    if not len(model.blocks):
        refuse("blocks", model.blocks, "it is empty")


def pool_by_attention(to: Lowering, name: str) -> Iterator[Operation]:
    """Yield timm's ``AttentionPoolLatent``: the attention, the MLP after it, and the one token as a vector."""
    yield attention_pool(to, name)
    if to.module(name).mlp is not None:
        yield Residual((to.mlp(f"{name}.mlp", f"{name}.norm"),))
    yield Pool("token")


def classify(to: Lowering, *names: str) -> Iterator[Classify]:
    """Yield the classifiers; a feature extractor has identities in their place."""
    if not all(isinstance(to.module(name), nn.Identity) for name in names):
        yield Classify(tuple(to.layer(name) for name in names))
