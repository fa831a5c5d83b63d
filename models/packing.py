"""Sub-byte packing of unsigned codes in the byte order of MatMulNBits: the first code of a byte sits in its lowest bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

_CHUNK_BYTES = 1 << 20
"""Packing works on about this many codes at a time: its wide temporaries stay in the cache."""


def pack(codes: npt.NDArray[np.uint8], bits: int) -> U8:
    """Packs codes [..., n] < 2**bits, n a multiple of 8/bits, into bytes [..., n * bits / 8]; bits in {2, 4, 8}."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    flat = np.ascontiguousarray(codes).reshape(-1)
    out = np.empty(flat.size // per_byte, np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        part = flat[start : start + _CHUNK_BYTES]
        # One little-endian word holds the codes of one byte, 8 bits apart: shift them together.
        word = part.view("<u2" if per_byte == 2 else "<u4")
        byte = word.copy()
        for i in range(1, per_byte):
            byte |= word >> (i * (8 - bits))
        first = start // per_byte
        out[first : first + byte.size] = byte.astype(np.uint8)
    return out.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte)


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> U8:
    """The inverse of `pack`: bytes [..., m] to codes [..., m * 8 / bits]."""
    if bits == 8:
        return packed
    per_byte = 8 // bits
    out = np.empty((*packed.shape, per_byte), np.uint8)
    for i in range(per_byte):
        np.bitwise_and(packed >> (i * bits), (1 << bits) - 1, out=out[..., i])
    return out.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)
