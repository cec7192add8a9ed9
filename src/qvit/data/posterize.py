"""timm's strongest posterization asks Pillow for 0 bits: a black image, until a later Pillow refused it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize


def allow_no_bits(transform: Any) -> Any:
    """Return a training transform of timm's whose posterization to 0 bits is a black image, whatever the Pillow."""
    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def _operations(part: Any) -> Iterator[AugmentOp]:
    """Yield the operations of a transform, which timm keeps in lists, and in lists of those."""
    if isinstance(part, AugmentOp):
        yield part
    elif isinstance(part, (list, tuple)):
        for inner in part:
            yield from _operations(inner)
    else:
        for name in ("transforms", "ops", "policy"):
            yield from _operations(getattr(part, name, ()))
