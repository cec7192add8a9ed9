"""What bits cost: bytes of the packed file and operations, counted from the program, and measured milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from qvit.analysis.size import Operations
from qvit.config import Bits
from qvit.format.ops import Layer, packed_bytes
from qvit.format.program import Program
from qvit.search.products import CANDIDATES, FreeProduct
from qvit.search.solve import Numbers, total
from qvit.search.timing import Times


class Unit(NamedTuple):
    """What a budget is given in: its name for people, and how much of the cost is one."""

    name: str
    size: int


UNITS = {"mb": Unit("MB", 10**6), "bops": Unit("G BOPs", 10**9), "ms": Unit("ms", 1)}
"""Of every budget, by the end of its option."""


class Cost(NamedTuple):
    """What a model costs, as a sum over its free products: milliseconds, bytes or bit operations.

    Attributes:
        fixed: what all the rest costs.
        by_candidate: of each free product with the bits of each of :data:`CANDIDATES`.
    """

    fixed: float
    by_candidate: Numbers

    def of(self, chosen: Sequence[int]) -> float:
        """Return the cost of a model, by the number of every product's candidate."""
        return self.fixed + total(self.by_candidate, chosen)


def counted_costs(program: Program, products: Sequence[FreeProduct]) -> dict[str, Cost]:
    """Return the costs that are counted, by the end of the option that limits them.

    - ``mb``: bytes of the packed file's tensors, codes, scales and all else; its header is not among them.
    - ``bops``: bit operations of one image (:attr:`qvit.analysis.size.Operations.bit_operations`).

    Args:
        program: of the model, at any bits.
        products: whose bits are free.
    """
    free, layers = {product.name for product in products}, program.layers()
    every_byte = sum(dtype.itemsize * math.prod(shape) for dtype, shape in program.entries().values())
    codes = [
        [_codes_bytes(layers[product.name], bits) if product.is_layer else 0 for bits in CANDIDATES]
        for product in products
    ]
    code_bytes = sum(
        _codes_bytes(layers[product.name], layers[product.name].bits) for product in products if product.is_layer
    )
    rest = [product for product in program.products() if product.name not in free]
    fixed = sum(_bit_operations(product.macs, product.bits) for product in rest)
    bit_operations = [[_bit_operations(product.macs, bits) for bits in CANDIDATES] for product in products]
    return {"mb": Cost(every_byte - code_bytes, codes), "bops": Cost(fixed, bit_operations)}


def time_cost(products: Sequence[FreeProduct], times: Times) -> Cost:
    """Return the milliseconds of one image in the engine, as measured, by products."""
    return Cost(
        times.reference, [[times.differences[product.name][bits] for bits in CANDIDATES] for product in products]
    )


def _codes_bytes(layer: Layer, bits: Bits) -> int:
    return layer.outputs * packed_bytes(layer.inputs, bits.weight)


def _bit_operations(macs: int, bits: Bits) -> int:
    return Operations({bits: macs}).bit_operations
