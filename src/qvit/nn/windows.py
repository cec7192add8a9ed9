"""Attention inside the windows of Swin, on codes (docs/method.md, section 4)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
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


class QuantCosineAttention(QuantAttention, swin_transformer_v2.WindowAttention):
    """Swin v2's ``WindowAttention``: queries and keys of length 1, a scale per head, a bias that a small MLP makes."""

    CONSTANT: ClassVar[tuple[str, ...]] = ("cpb_mlp",)
    COSINE: ClassVar[float] = 1e-12
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend windows to themselves; arguments as in :class:`QuantWindowAttention`."""
        q, k, v = self.split(self.with_bias(self.qkv(x)))
        q, k = (F.normalize(operand, dim=-1, eps=self.COSINE) for operand in (q, k))
        N = x.shape[1]
        bias = self.bias_table()[self.relative_position_index.view(-1)].view(N, N, -1).permute(2, 0, 1).unsqueeze(0)
        return self.project(self.attend(q, k, v, self.logit_factor(), masked(bias, mask)))

    def logit_factor(self) -> Tensor:
        """Return what the logits are multiplied with, ``(H, 1, 1)``."""
        return torch.clamp(self.logit_scale, max=math.log(1 / 0.01)).exp()

    def bias_table(self) -> Tensor:
        """Return the bias of each relative position, ``(rows, H)``."""
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table)).view(-1, self.num_heads)


class QuantLogCosineAttention(QuantAttention, swin_transformer_v2_cr.WindowMultiHeadAttention):
    """The attention of ``SwinTransformerV2Cr``: as :class:`QuantCosineAttention`, with a bias of another MLP."""

    CONSTANT: ClassVar[tuple[str, ...]] = ("meta_mlp",)
    COSINE: ClassVar[float] = 1e-12

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend windows to themselves; arguments as in :class:`QuantWindowAttention`."""
        q, k, v = self.split(self.qkv(x))
        q, k = (F.normalize(operand, dim=-1, eps=self.COSINE) for operand in (q, k))
        bias = masked(self._relative_positional_encodings(), mask)
        return self.project(self.attend(q, k, v, self.logit_factor(), bias))

    def logit_factor(self) -> Tensor:
        """Return what the logits are multiplied with, ``(H, 1, 1)``."""
        return torch.clamp(self.logit_scale, max=math.log(1 / 0.01)).exp()[:, None, None]

    def bias_table(self) -> Tensor:
        """Return the bias of each relative position, ``(rows, H)``."""
        sides = [torch.arange(1 - side, side, device=self.logit_scale.device) for side in self.window_size]
        offsets = torch.cartesian_prod(*sides).to(self.logit_scale.dtype)
        table: Tensor = self.meta_mlp(torch.sign(offsets) * torch.log(1 + offsets.abs()))
        return table


def masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``bias (1, H, N, N)`` with the mask of each window ``(windows, N, N)`` added to it."""
    return bias if mask is None else torch.add(bias, mask.unsqueeze(1))
