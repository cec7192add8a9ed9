"""What functions of Python take for images: a batch as a loader gives it, with labels or without."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qvit.errors import DataError


def images_of(batch: Any) -> Tensor:
    """Return the images ``(B, C, H, W)`` of a batch: itself, or the first of a tuple or a list.

    Raises:
        DataError: for anything but a tensor of four dimensions in floating point.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"Batches must be tensors of images (B, C, H, W) in floating point, and one is {kind}: give a list of "
            "batches, of images that are prepared as for the model."
        )
    return images
