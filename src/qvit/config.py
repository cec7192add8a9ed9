"""What is quantized to how many bits. Plain data, no PyTorch, so that the runtime can read it too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from qvit.errors import ConfigError
from qvit.files import shown

MIN_BITS, MAX_BITS = 2, 8
EDGE_BITS = 8
"""Bits of the patch embedding and the classifier heads (docs/method.md, section 1: "8 bits for weights and inputs")."""

RectifierKind = Literal["head", "token"]


class Bits(NamedTuple):
    """Bits of one module: of its weights and of the activations that enter it."""

    weight: int
    activation: int


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Args:
        weight_bits: bits of every linear layer's weights, 2..8.
        activation_bits: bits of every activation that enters a product, 2..8.
        rectifier: over what queries and keys are normalised before they are quantized (docs/method.md, section 2):
            ``"head"`` (all values of one head), ``"token"`` (each token of each head), or ``None`` for none at all.
        overrides: bits by module-name pattern (:func:`fnmatch.fnmatchcase`), an integer for both or
            ``(weight, activation)``; the last matching pattern wins. The patch embedding and the heads have 8 bits
            unless a pattern names them. Example: ``{"blocks.0.*": 8, "blocks.*.mlp.fc2": (2, 4)}``.

    Raises:
        ConfigError: for bits outside 2..8 or an unknown ``rectifier``.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    rectifier: RectifierKind | None = "head"
    overrides: Mapping[str, int | tuple[int, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        _check_bits("activation_bits", self.activation_bits)
        if self.rectifier not in ("head", "token", None):
            raise ConfigError(f'rectifier must be "head", "token" or None, not {shown(self.rectifier)}.')
        if not isinstance(self.overrides, Mapping) or not all(isinstance(name, str) for name in self.overrides):
            raise ConfigError(f"overrides must be bits by the names of modules, not {shown(self.overrides)}.")
        for pattern, bits in self.overrides.items():
            for value in _pair(bits):
                _check_bits(f"overrides[{shown(pattern)}]", value)

    def bits(self, name: str, ends: Sequence[str] = ()) -> Bits:
        """Return the bits of the module called ``name`` (its dotted name inside the model).

        Args:
            name: of a layer, or of a quantizer of an attention.
            ends: patterns of the layers that keep :data:`EDGE_BITS`: the family of the model knows them.
        """
        chosen = Bits(self.weight_bits, self.activation_bits)
        if any(fnmatchcase(name, end) for end in ends):
            chosen = Bits(EDGE_BITS, EDGE_BITS)
        for pattern, bits in self.overrides.items():
            if fnmatchcase(name, pattern):
                chosen = _pair(bits)
        return chosen

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns of the overrides that match none of ``names``, the modules that have bits."""
        names = list(names)
        return [pattern for pattern in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready data; :meth:`from_dict` reads it back."""
        return {**dataclasses.asdict(self), "overrides": {name: list(_pair(b)) for name, b in self.overrides.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ConfigError: for a field that is unknown or has a value that cannot be meant.
        """
        unknown = set(data) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"Unknown field {shown(min(unknown, key=str))} in the quantization config.")
        return cls(**data)


def bits_text(bits: Sequence[int], overrides: Collection[str]) -> str:
    """Return a model's bits of weights and activations for people: ``"2/4 (3 overrides)"``."""
    count = len(overrides)
    others = f" ({count} override{'s' if count > 1 else ''})" if count else ""
    return f"{'/'.join(map(str, bits))}{others}"


def _pair(bits: Any) -> Bits:
    if isinstance(bits, int):
        return Bits(bits, bits)
    try:
        weight, activation = bits
    except (TypeError, ValueError):
        raise ConfigError(
            f"An override is a number of bits or (weight bits, activation bits), not {shown(bits)}."
        ) from None
    return Bits(weight, activation)


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number of Python's, as files hold them, from ``least`` to ``most``.

    Raises:
        ConfigError: naming it.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"{least} up" if most is None else f"{least} to {most}"
        raise ConfigError(f"{name} must be a whole number from {limits}, not {shown(value)}.")


def check_number(name: str, value: Any, *, above_zero: bool) -> None:
    """Refuse what is no finite number of Python's above 0, or from 0 up.

    Raises:
        ConfigError: naming it.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value < math.inf
    if not number or not (value > 0 if above_zero else value >= 0):
        raise ConfigError(f"{name} must be a number {'above 0' if above_zero else 'from 0 up'}, not {shown(value)}.")


def _check_bits(what: str, bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{what} must be a whole number from {MIN_BITS} to {MAX_BITS}, not {shown(bits)}.")
