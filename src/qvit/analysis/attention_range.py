"""How far attention reaches in the image, in pixels, and where in it: any family's (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvit.format.ops import Embed
from qvit.models.queries import attention_layers
from qvit.quantization.convert import program_of


@dataclass(frozen=True)
class AttentionGrid:
    """Where in the image the tokens of an attention layer are.

    Attributes:
        name: of the layer.
        grid: rows and columns of patches.
        window: rows and columns of those that attend to one another: of ``grid`` where there are no windows.
        shift: by how many patches the windows are shifted against the image.
        pitch: height and width of a patch in pixels of the model's input.
        prefix: tokens before the patches, which are nowhere in the image.
    """

    name: str
    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    pitch: tuple[int, int]
    prefix: int

    def distances(self) -> Tensor:
        """Return the distances between the centres of a window's patches in pixels, ``(n, n)`` float32."""
        rows, columns = (
            torch.arange(count) * float(pitch) for count, pitch in zip(self.window, self.pitch, strict=True)
        )
        places = torch.cartesian_prod(rows, columns)
        return torch.cdist(places, places)

    def received(self, maps: Tensor) -> Tensor:
        """Return how much attention each patch gets, ``(B, rows, columns)`` summing to 1 over an image.

        It is that of the class token, or the first token before the patches, where there is one, else the mean over all
        queries; mean over the heads.

        Args:
            maps: ``(B * windows, H, N, N)``, the windows of an image one after the other.
        """
        attention = maps[..., self.prefix :].float().mean(dim=1)
        received = attention[:, 0] if self.prefix else attention.mean(dim=1)
        (rows, columns), (height, width) = self.grid, self.window
        tiled = received.unflatten(0, (-1, rows // height, columns // width)).unflatten(-1, (height, width))
        whole = tiled.transpose(2, 3).reshape(-1, rows, columns).roll(self.shift, dims=(1, 2))
        return whole / whole.sum(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(whole.dtype).tiny)


def attention_grids(model: nn.Module, image_size: tuple[int, int]) -> list[AttentionGrid]:
    """Return where the tokens of every attention layer are, in the order they run.

    It is read from the program that the model is lowered to, so it holds for every family.

    Args:
        model: a float model of a family that qvit knows, or what :func:`qvit.quantize` made of one.
        image_size: height and width in pixels.

    Raises:
        UnsupportedModelError: naming the module that qvit does not know.
        ConfigError: if the model does not take images of this size.
    """
    program = program_of(model, image_size)
    after = zip(program.operations, program.streams[1:], strict=True)
    patch, patches = next((embed.patch, stream.grid) for embed, stream in after if isinstance(embed, Embed))
    names = {module: name for name, module in model.named_modules()}
    attentions = program.attentions()
    grids = []
    for layer in attention_layers(model):
        attention: Any
        attention, stream = attentions[names[layer]]
        merged = patches[0] // stream.grid[0], patches[1] // stream.grid[1]
        pitch = patch[0] * merged[0], patch[1] * merged[1]
        window = attention.window or stream.grid
        grids.append(AttentionGrid(names[layer], stream.grid, window, attention.shift, pitch, stream.prefix))
    return grids


class AttentionRange:
    """Adds up the mean distance over which each head attends, in pixels.

    For a patch ``i`` of the image it is ``sum_j P_ij d_ij / sum_j P_ij`` over the patches ``j``, with ``d_ij`` the
    distance of their centres: tokens that are nowhere in the image, class token and registers, are left out, and what
    remains of the row is normalised. Where attention stays inside windows, ``j`` is of the same window. The range is
    the mean over patches, windows and images (Dosovitskiy et al., ICLR 2021: *mean attention distance*).

    Args:
        grids: of :func:`attention_grids`.
    """

    def __init__(self, grids: Sequence[AttentionGrid]) -> None:
        self.grids = grids
        self._distances = [grid.distances() for grid in grids]
        self._totals = [torch.zeros((), dtype=torch.float64) for _ in grids]
        self._rows = [0 for _ in grids]

    def add(self, maps: Sequence[Tensor]) -> None:
        """Take in the maps of every layer, ``(B * windows, H, N, N)`` each."""
        for index, (grid, layer) in enumerate(zip(self.grids, maps, strict=True)):
            attention = layer[..., grid.prefix :, grid.prefix :].float()
            weights = attention.sum(dim=-1).clamp(min=torch.finfo(attention.dtype).tiny)
            distances = self._distances[index].to(attention.device)
            reached = (torch.einsum("bhij,ij->bhi", attention, distances) / weights).sum(dim=(0, 2))
            self._totals[index] = self._totals[index] + reached.double().cpu()
            self._rows[index] += attention.shape[0] * attention.shape[2]

    def result(self) -> list[list[float]]:
        """Return pixels by head, layer by layer."""
        return [(total / rows).tolist() for total, rows in zip(self._totals, self._rows, strict=True)]
