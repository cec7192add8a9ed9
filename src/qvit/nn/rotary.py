"""Attention with rotated queries and keys (docs/method.md, section 4): EVA-02's, DINOv3's and others'."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat, resolve_self_attn_mask
from torch import Tensor, nn

from qvit.config import QuantConfig
from qvit.errors import UnsupportedModelError
from qvit.nn.attention import QuantAttention


class QuantRotaryAttention(QuantAttention):
    """timm's ``EvaAttention`` and ``AttentionRope``; queries, keys and values from one projection or from three.

    Raises:
        UnsupportedModelError: if several heads share keys and values, or the three projections have other bits.
    """

    scale: float
    num_prefix_tokens: int
    rotate_half: bool
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    q_proj: Any
    k_proj: Any
    v_proj: Any

    def __init__(self, attention: nn.Module, config: QuantConfig | None, name: str) -> None:
        super().__init__(attention, config, name)
        self._name = name
        if getattr(attention, "num_kv_groups", 1) != 1:
            raise UnsupportedModelError(
                f"Cannot quantize {name} ({type(attention).__name__}): heads that share keys and values are not "
                "supported."
            )

    def tie(self) -> None:
        """Let three projections of the same tokens share one input quantizer: they are one layer in a packed file."""
        if self.q_proj is None:
            return
        shared = self.q_proj.input_quantizer
        for part in ("k_proj", "v_proj"):
            module = getattr(self, part)
            if module.input_quantizer.bits != shared.bits:
                raise UnsupportedModelError(
                    f"Cannot quantize {self._name}.{part} ({type(module).__name__}): its input has other bits than "
                    "that of q_proj, and is the same."
                )
            module.input_quantizer = shared

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend ``(B, N, C)`` to itself.

        Args:
            x: tokens, those before the patches first.
            rope: sines and cosines of the patches' rotation, ``(patches, 2 D)`` or ``(H, patches, 2 D)``.
            attn_mask: as in timm's ``Attention``.
            is_causal: likewise.
        """
        if self.q_proj is None:
            qkv = self.with_bias(self.qkv(x))
        else:
            qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        q, k, v = self.split(qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope), self._rotated(k, rope)
        bias = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        return self.project(self.norm(self.attend(q, k, v, self.scale, bias)))

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2).type_as(x)
