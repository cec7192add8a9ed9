"""Attention inside the windows of Swin, on codes."""

from __future__ import annotations

import torch
from timm.models import swin_transformer
from torch import Tensor

from qvit.nn.attention import QuantAttention


class QuantWindowAttention(QuantAttention, swin_transformer.WindowAttention):
    """Swin's ``WindowAttention``: a bias by relative position, and a mask where the windows are shifted."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend the windows ``(B * windows, N, C)`` to themselves.

        Args:
            x: tokens, the windows of an image one after the other.
            mask: added to the logits, ``(windows, N, N)``.
        """
        q, k, v = self.split(self.qkv(x))
        return self.project(self.attend(q, k, v, self.scale, masked(self._get_rel_pos_bias(), mask)))


def masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``bias (1, H, N, N)`` with the mask of each window ``(windows, N, N)`` added to it."""
    return bias if mask is None else torch.add(bias, mask.unsqueeze(1))
