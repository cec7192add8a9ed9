"""Codes of 2 to 8 bits, packed at their true width. No PyTorch here."""

from __future__ import annotations

import numpy as np


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed codes ``(..., n)`` of ``bits`` bits into bytes ``(..., ceil(n * bits / 8))``, uint8.

    Code ``k`` of a row, plus ``2^(bits-1)``, takes the bits ``k * bits`` to ``(k + 1) * bits`` of its bytes, counted
    from the least significant bit of the first one; what is left of the last byte is 0.

    Raises:
        ValueError: for a code outside ``[-2^(bits-1), 2^(bits-1) - 1]``.
    """
    half = 2 ** (bits - 1)
    if codes.size and not (codes.min() >= -half and codes.max() < half):
        raise ValueError(f"a code of {bits} bits must be in [{-half}, {half - 1}]")
    unsigned = (codes + half).astype(np.uint8)
    stream = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_codes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the signed codes ``(..., count)``, int8, of bytes ``(..., ceil(count * bits / 8))``."""
    # Eight codes are `bits` whole bytes, so the k-th of every eight lies at the same place of them.
    groups = -(-count // 8)
    bytes_ = np.zeros((*data.shape[:-1], groups * bits), np.uint8)
    bytes_[..., : data.shape[-1]] = data
    bytes_ = bytes_.reshape(*data.shape[:-1], groups, bits)
    codes = np.empty((*data.shape[:-1], groups, 8), np.uint8)
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        code = bytes_[..., byte] >> shift
        if shift + bits > 8:
            code |= bytes_[..., byte + 1] << (8 - shift)
        codes[..., k] = (code & (2**bits - 1)) - 2 ** (bits - 1)  # modulo 256: two's complement
    return codes.reshape(*data.shape[:-1], groups * 8)[..., :count].view(np.int8)
