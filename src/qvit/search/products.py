"""The products of a network whose bits are to be found, and the overrides that set them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from glob import escape
from typing import NamedTuple

from torch import nn

from qvit.config import Bits
from qvit.format.program import Program
from qvit.models.families import family_of

WIDTHS = (2, 3, 4, 6, 8)
"""Numbers of bits that are tried; between 4 and 8 one bit more or less is worth little."""
CANDIDATES = tuple(Bits(weight, activation) for weight in WIDTHS for activation in WIDTHS)
"""Bits of a product: of weights, keys or values, and of inputs, queries or the attention map; the fewest first."""


class FreeProduct(NamedTuple):
    """A product of the program whose bits are to be found: that of a layer, or one of both of an attention.

    Attributes:
        name: in the program.
        macs: multiply-adds of one image.
        inputs: name of the quantizer of inputs, queries or the attention map, inside the model.
        weights: names of the quantizers of weights, keys or values: three where one layer of the program is three.
    """

    name: str
    macs: int
    inputs: str
    weights: tuple[str, ...]

    @property
    def is_layer(self) -> bool:
        """Whether it has weights of its own."""
        return self.weights[0].endswith(_WEIGHTS)

    def overrides(self, bits: Bits) -> dict[str, Bits]:
        """Return the overrides of :class:`qvit.QuantConfig` that give it these bits; each matches one name alone."""
        if self.is_layer:
            return {escape(name.removesuffix(_WEIGHTS)): bits for name in self.weights}
        return {
            escape(self.weights[0]): Bits(bits.weight, bits.weight),
            escape(self.inputs): Bits(bits.activation, bits.activation),
        }

    def program_bits(self, bits: Bits) -> dict[str, Bits]:
        """Return these bits by the names of :meth:`qvit.format.program.Program.bits`."""
        if self.is_layer:
            return {self.name: bits}
        owner, _, operand = self.name.rpartition(".")
        other = _OPERANDS[operand][1]
        return {f"{owner}.{other}": Bits(bits.weight, bits.weight), self.name: Bits(bits.activation, bits.activation)}


_WEIGHTS = ".weight_quantizer"
_OPERANDS = {"query": ("query", "key"), "map": ("attention", "value")}
"""By the last part of a product's name in the program, what its two operands are called in the model."""


def free_products(student: nn.Module, program: Program) -> list[FreeProduct]:
    """Return the products that keep no 8 bits as the patch embedding and the heads do (docs/method.md, section 1).

    Args:
        student: what :func:`qvit.quantize` returned.
        program: that it is lowered to.
    """
    modules = dict(student.named_modules())
    ends, layers = family_of(student).ENDS, program.layers()
    found: list[FreeProduct] = []
    for product in program.products():
        if any(fnmatchcase(product.name, end) for end in ends):
            continue
        if product.name not in layers:
            owner, _, operand = product.name.rpartition(".")
            inputs, weights = (f"{owner}.{name}_quantizer" for name in _OPERANDS[operand])
            found.append(FreeProduct(product.name, product.macs, inputs, (weights,)))
            continue
        names = [product.name]
        if product.name not in modules:  # queries, keys and values that are three layers of the model
            names = [f"{product.name.removesuffix('.qkv')}.{part}_proj" for part in "qkv"]
        weights_of = tuple(f"{name}{_WEIGHTS}" for name in names)
        found.append(FreeProduct(product.name, product.macs, f"{names[0]}.input_quantizer", weights_of))
    return found
