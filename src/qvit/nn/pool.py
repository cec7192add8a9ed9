"""Pooling by attention (docs/method.md, section 4): the tokens are attended to by one learned query per head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from qvit.config import QuantConfig
from qvit.nn.attention import QuantAttention


class QuantAttentionPool(QuantAttention, AttentionPoolLatent):
    """timm's ``AttentionPoolLatent`` with one latent query, which nothing rectifies: it is the same for every image."""

    CONSTANT: ClassVar[tuple[str, ...]] = ("q", "q_norm")

    def _add_quantizers(self, config: QuantConfig | None, name: str) -> None:
        super()._add_quantizers(config and dataclasses.replace(config, rectifier=None), name)
        self.attn_drop = nn.Dropout(0.0)

    def query(self) -> Tensor:
        """Return the query, ``(1, H, 1, D)``."""
        q: Tensor = self.q_norm(self.q(self.latent).reshape(1, self.num_heads, 1, self.head_dim))
        return q

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Pool tokens ``(B, N, C)``, to which ``attn_mask`` may be added: ``(B, C)``."""
        B, N, _ = x.shape
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.project(self.attend(self.query().expand(B, -1, -1, -1), self.k_norm(k), v, self.scale, attn_mask))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0]
