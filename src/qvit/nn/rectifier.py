"""The information rectification module (IRM), both readings of it (docs/method.md, section 2).

    q~ = (q - mu(q) + beta) / (gamma * sqrt(var(q) + eps))

Q-ViT (Li et al., NeurIPS 2022), section 3.2. gamma and beta are trained, one value per channel and head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qvit.nn.quantizer import Float32Module
from qvit.nn.recompute import in_backward_pass, recomputed

EPS = 1e-6
MOMENTUM = 0.1
"""Weight of a new batch in the running averages, as in BatchNorm."""

if dist.is_available():
    # PyTorch imports it at the first collective below. Its functions have the group of that moment for a default, which
    # would outlive destroy_process_group: threads of gloo that still hold a tensor abort a Python that ends.
    import torch.distributed.nn.functional

RectifierInit = Literal["teacher", "unit", "keep"]


class Rectifier(Float32Module):
    """What both readings share: gamma and beta, and the arithmetic around the statistics.

    Args:
        heads: number of heads H.
        head_dim: channels per head D.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, head_dim))
        self.beta = nn.Parameter(torch.zeros(heads, 1, head_dim))
        self.enabled = True

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of ``x (B, H, N, D)``, broadcastable against it."""
        raise NotImplementedError

    def fit(self, x: Tensor) -> None:
        """Set statistics, gamma and beta so that the rectified ``x (B, H, N, D)`` is as near to ``x`` as they allow."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Rectify queries or keys ``(B, H, N, D)``; float32 inside, the input's dtype outside."""
        if not self.enabled:
            return x
        mean, variance = self.statistics(_wide(x))
        return recomputed(self._rectify, x, mean, variance)

    def _rectify(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        # What is small comes first: with ``head`` statistics the large tensor then meets one shift and one factor a
        # channel, and the gradients of mean, variance, gamma and beta come from two sums over it.
        return ((_wide(x) - (mean - self.beta)) * (torch.rsqrt(variance + EPS) / self.gamma)).to(x.dtype)

    def extra_repr(self) -> str:
        """Say the shape of gamma and beta."""
        heads, _, head_dim = self.gamma.shape
        return f"heads={heads}, head_dim={head_dim}"


class TokenRectifier(Rectifier):
    """Statistics over the channels of every token and head: what the authors' code does, a LayerNorm over head_dim."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(B, H, N, 1)`` statistics."""
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return mean, variance

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit gamma and beta by least squares, channel by channel.

        With ``u = (x - mu) / s`` and ``w = 1 / s``, ``q~ = a u + c w`` is linear in ``a = 1 / gamma`` and
        ``c = beta / gamma``: a 2 x 2 system per channel.
        """
        x = x.double()
        mean, variance = self.statistics(x)
        w = torch.rsqrt(variance + EPS).expand_as(x)
        u = (x - mean) * w

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(dim=(0, 2))  # over batch and tokens: (H, D)

        uu, uw, ww, ux, wx = dot(u, u), dot(u, w), dot(w, w), dot(u, x), dot(w, x)
        determinant = uu * ww - uw * uw
        a = (ux * ww - wx * uw) / determinant
        c = (wx * uu - ux * uw) / determinant
        # A channel that is constant over the data leaves the system singular, or the best a at or below 0, where
        # gamma would blow up or turn the sign: keep the spread of the others there and fit beta alone.
        usable = torch.isfinite(a) & (a > 1e-3 * a.abs().nanmedian())
        a = torch.where(usable, a, 1 / w.mean())
        c = torch.where(usable, c, (wx - a * uw) / ww)
        self.gamma.copy_((1 / a).unsqueeze(1))
        self.beta.copy_((c / a).unsqueeze(1))


class HeadRectifier(Rectifier):
    """Statistics over batch, tokens and channels of one head; running averages in evaluation, as BatchNorm keeps them.

    In training under ``torch.distributed`` the statistics are those of the whole batch of all processes.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.register_buffer("running_mean", torch.zeros(heads, 1, 1))
        self.register_buffer("running_var", torch.ones(heads, 1, 1))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(H, 1, 1)`` statistics: of this batch in training, the running averages in evaluation."""
        if not self.training:
            return self.running_mean, self.running_var
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
        mean, variance = mean[0], variance[0]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean, variance = _across_processes(mean, variance, x.shape[0])
        if in_backward_pass():
            return mean, variance
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), MOMENTUM)
            self.running_var.lerp_(variance.detach().to(self.running_var.dtype), MOMENTUM)
        return mean, variance

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the running averages to those of ``x``, and gamma and beta so that ``q~ = q`` exactly."""
        variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), keepdim=True, correction=0)
        self.running_mean.copy_(mean[0])
        self.running_var.copy_(variance[0])
        self.gamma.copy_(torch.rsqrt(variance[0] + EPS).expand_as(self.gamma))
        self.beta.copy_(mean[0].expand_as(self.beta))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _across_processes(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all processes' images, ``count`` of them in this one; differentiable."""
    from torch.distributed._functional_collectives import all_reduce

    weight = torch.full_like(mean, count)
    moments = torch.stack([weight, weight * mean, weight * (variance + mean * mean)])
    total, first, second = all_reduce(moments, "sum", dist.group.WORLD).unbind(0)  # type: ignore[arg-type]
    mean = first / total
    return mean, second / total - mean * mean


def make_rectifier(kind: str | None, heads: int, head_dim: int) -> nn.Module:
    """Return the rectifier for ``QuantConfig.rectifier``; ``None`` gives the identity (the plain baseline)."""
    if kind is None:
        return nn.Identity()
    return {"head": HeadRectifier, "token": TokenRectifier}[kind](heads, head_dim)
