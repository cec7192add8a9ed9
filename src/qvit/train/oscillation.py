"""Weights that change code back and forth (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training").

ICML 2022, equations 4 and 5. A weight near the border of two codes is pushed over it by the straight-through gradient,
step after step, and settles on neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qvit.nn.quantizer import Quantizer, from_codes, to_codes
from qvit.train.distributed import beside, whole

MOMENTUM = 0.01
"""Weight of a step in the running averages, as in the paper."""
OSCILLATING = 0.005
"""A weight counts as oscillating from this frequency on, as in the paper's tables."""


class Oscillation:
    """Follows the codes of all quantized weights of a model.

    A step is an oscillation of a weight if its code changes in the direction opposite to its last change; the
    frequency is the running average of those.

    Args:
        model: quantized; of a float one there is nothing to follow.
        freeze_above: weights of a higher frequency are frozen to the code they had on average, and follow only their
            scale from then on (the paper's iterative freezing, with a constant threshold); 0 to freeze none.
    """

    def __init__(self, model: nn.Module, freeze_above: float = 0.0) -> None:
        self.freeze_above = freeze_above
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if type(getattr(module, "weight_quantizer", None)) is Quantizer
        }
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            codes = _codes(layer)
            self.state[name] = {
                "codes": codes.to(torch.int8),
                "direction": torch.zeros_like(codes, dtype=torch.int8),
                "frequency": torch.zeros_like(codes, dtype=torch.float32),
            }
            if freeze_above:
                self.state[name] |= {"average": codes.float(), "frozen": torch.zeros_like(codes, dtype=torch.bool)}

    @torch.no_grad()
    def update(self) -> None:
        """Take note of the weights after an optimizer step, and freeze what is to be frozen."""
        for name, layer in self.layers.items():
            state = self.state[name]
            codes = _codes(layer)
            new = codes.to(torch.int8)
            moved = (new > state["codes"]).to(torch.int8) - (new < state["codes"]).to(torch.int8)
            back = moved * state["direction"] < 0
            state["frequency"].mul_(1 - MOMENTUM).add_(back, alpha=MOMENTUM)
            state["direction"] = torch.where(moved != 0, moved, state["direction"])
            state["codes"] = new
            if self.freeze_above:
                self._freeze(layer, state, codes)

    def percentages(self) -> dict[str, float]:
        """Return the percentage of oscillating and, if any may be, of frozen weights; all processes must call it."""
        weights = sum(state["codes"].numel() for state in self.state.values())
        oscillating = sum(float(whole((s["frequency"] > OSCILLATING).sum())) for s in self.state.values())
        percentages = {"oscillating": 100 * oscillating / weights}
        if self.freeze_above:
            percentages["frozen"] = 100 * sum(float(whole(s["frozen"].sum())) for s in self.state.values()) / weights
        return percentages

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return all that is followed, as plain tensors; all processes must call it."""
        return {name: {key: whole(value) for key, value in state.items()} for name, state in self.state.items()}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            KeyError: if something is absent from it, such as what freezing needs.
        """
        for name, state in self.state.items():
            for key, value in state.items():
                tensor = saved[name][key].to(value.device)
                if isinstance(value, DTensor):
                    tensor = distribute_tensor(tensor, value.device_mesh, value.placements)
                state[key] = tensor

    def _freeze(self, layer: Any, state: dict[str, Tensor], codes: Tensor) -> None:
        average, frozen = state["average"], state["frozen"]
        average = torch.where(frozen, average, average + MOMENTUM * (codes - average))
        # The rounded average of a frozen weight is its code for good.
        fresh = (state["frequency"] > self.freeze_above) & ~frozen
        state["average"] = torch.where(fresh, torch.round(average), average)
        state["frozen"] = frozen | fresh
        scale = beside(layer.weight_quantizer.scale, layer.weight)
        layer.weight.copy_(torch.where(state["frozen"], from_codes(state["average"], scale, None), layer.weight))


@torch.no_grad()
def _codes(layer: Any) -> Tensor:
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    return to_codes(weight, beside(quantizer.scale, weight), None, quantizer.low, quantizer.high)
