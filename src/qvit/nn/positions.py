"""Attention with a bias by relative position (docs/method.md, section 4): BEiT's, and that of timm's ``vit_relpos``."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models import beit
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from qvit.nn.attention import QuantAttention


class QuantBeitAttention(QuantAttention, beit.Attention):
    """BEiT's ``Attention``: keys have no bias, and the table of relative positions has rows for the class token."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attend ``(B, N, C)`` to itself.

        Args:
            x: tokens.
            shared_rel_pos_bias: a bias for all layers, ``(H, N, N)``.
        """
        q, k, v = self.split(self.with_bias(self.qkv(x)))
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        return self.project(self.attend(q, k, v, self.scale, bias))


class QuantRelPosAttention(QuantAttention, RelPosAttention):
    """The attention of timm's ``VisionTransformerRelPos``, whose bias a table or a small MLP makes."""

    CONSTANT: ClassVar[tuple[str, ...]] = ("rel_pos",)
    rel_pos: Any

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend ``(B, N, C)`` to itself.

        Args:
            x: tokens.
            shared_rel_pos: a bias for all layers, ``(1, H, N, N)``, for a layer without one of its own.
        """
        q, k, v = self.split(self.qkv(x))
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self.project(self.attend(self.q_norm(q), self.k_norm(k), v, self.scale, bias))
