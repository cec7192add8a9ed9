"""The reference led by an engine's codes: what shows that they differ from its own at borders alone, and nowhere else.

Float arithmetic differs in its last places, so a value beside the border between two codes may fall either way, and
then everything after it in its image differs. Here the reference goes on with the engine's codes after each quantizer,
so that every code of the engine is held against a value made from the engine's own codes before it, in every image.
"""

from __future__ import annotations

from collections.abc import Mapping
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from qvit.format.packed import PackedModel
from qvit.runtime import reference
from qvit.runtime.engine import Engine

BORDER = 1e-4
"""How near to a border between codes, in codes, a value must lie to fall on the other side of it: some places of a
float32 of a few hundred."""
ROUNDING = 2.0**-22
"""Of a value of an attention map, for each unit of the largest logit: what rounding that to float32 does to its
exponential, in the engine and in the reference."""
CLOSE = 3e-5
"""Of the largest output: what float32 sums behind the last codes may come to."""
QUANTIZE, SOFTMAX = reference.quantize, reference.softmax


class Following(reference.ReferenceEngine):
    """The reference, with codes that an engine gave in place of its own.

    Raises:
        AssertionError: where called, naming the first quantizer with a code that its value does not lie beside.
    """

    def __init__(self, packed: PackedModel, codes: Mapping[str, NDArray[np.uint8]]) -> None:
        self.given, self.seen = codes, set[str]()
        super().__init__(packed, self._follow)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with (
            mock.patch.object(reference, "quantize", self._quantize),
            mock.patch.object(reference, "softmax", self._softmax),
        ):
            return super().__call__(images)

    def _softmax(self, logits: NDArray[np.float64]) -> NDArray[np.float32]:
        self._largest = np.abs(logits).max()
        return SOFTMAX(logits)

    def _quantize(self, x, scale, offset, low: int, high: int) -> NDArray[np.int64]:
        self._low, self._value = low, np.clip((x.astype(np.float64) - offset) / scale, low, high) - low
        return QUANTIZE(x, scale, offset, low, high)

    def _follow(self, name: str, codes: NDArray[np.int64]) -> None:
        given = self.given[name]
        assert given.shape == codes.shape, name
        border = BORDER + (ROUNDING * self._largest * self._value if name.endswith(".map") else 0.0)
        far = np.abs(self._value - given) - 0.5
        assert (far <= border).all(), f"{name}: a code lies {(far - border).max():.1e} codes beyond its border"
        self.seen.add(name)
        codes[...] = given
        codes += self._low


def check_codes(packed: PackedModel, engine: Engine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an engine's outputs, which and whose codes are all held against the reference.

    Raises:
        AssertionError: naming what differs.
    """
    following = Following(packed, engine.codes(images))
    expected, outputs = following(images), engine(images)
    assert following.given.keys() == following.seen
    error = np.abs(outputs - expected).max()
    assert error <= CLOSE * max(1.0, np.abs(expected).max()), (engine.instruction_set, error)
    return outputs
