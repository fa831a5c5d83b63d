"""The form of quantized weights that MatMulNBits reads: codes in blocks along K, several to a byte, low bits first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_CHUNK_BYTES = 1 << 20
"""Packing works on about this many codes at a time: its wide temporaries stay in the cache."""


def pack(codes: U8, bits: int) -> U8:
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


def unpack(packed: U8, bits: int) -> U8:
    """The inverse of `pack`: bytes [..., m] to codes [..., m * 8 / bits]."""
    if bits == 8:
        return packed
    per_byte = 8 // bits
    out = np.empty((*packed.shape, per_byte), np.uint8)
    for i in range(per_byte):
        np.bitwise_and(packed >> (i * bits), (1 << bits) - 1, out=out[..., i])
    return out.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)


def by_block(x: npt.NDArray[Any], block: int) -> list[tuple[npt.NDArray[Any], slice]]:
    """Views of x [..., K] as [..., G, block] with the slice of groups they cover: the whole blocks, then the rest."""
    k = x.shape[-1]
    whole = k // block
    views = []
    if whole:
        views.append((x[..., : whole * block].reshape(*x.shape[:-1], whole, block), slice(0, whole)))
    if whole * block < k:
        views.append((x[..., None, whole * block :], slice(whole, whole + 1)))
    return views


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight [N, K]; G = ceil(K / block_size)."""

    codes: U8
    """[N, K], unsigned."""
    scales: F32
    """[N, G]; negative ones are allowed."""
    zero_points: U8 | None
    """[N, G], unpacked; None means 2^(storage_bits - 1) everywhere."""
    bits: int
    storage_bits: int
    block_size: int
    padding: U8 | None = None
    """[N], the code that fills each row's last block; None means the block's zero point. Kernels ignore it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, rows: slice) -> Quantized:
        """These rows alone, padded with their zero points."""
        zeros = None if self.zero_points is None else self.zero_points[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zero_points=zeros, padding=None)

    def dequantize(self) -> F32:
        """(codes - z) * s, float32 [N, K]."""
        out = self.codes.astype(np.float32)
        for part, groups in by_block(out, self.block_size):
            part -= 1 << (self.storage_bits - 1) if self.zero_points is None else self.zero_points[:, groups, None]
            part *= self.scales[:, groups, None]
        return out

    def packed_codes(self) -> U8:
        """uint8 [N, G, block_size * storage_bits / 8], low bits first; K is padded with `pad_codes`."""
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        padded = self.codes
        if groups * self.block_size != k:
            padded = np.empty((n, groups * self.block_size), np.uint8)
            padded[:, :k] = self.codes
            padded[:, k:] = self.pad_codes()[:, None]
        return pack(padded, self.storage_bits).reshape(n, groups, -1)

    def stored_zero_points(self) -> U8:
        """[N, G], the centre of the storage where none are given."""
        if self.zero_points is not None:
            return self.zero_points
        return np.full(self.scales.shape, 1 << (self.storage_bits - 1), np.uint8)

    def pad_codes(self) -> U8:
        """[N], the code behind the last input of each row."""
        if self.padding is not None:
            return self.padding
        if self.zero_points is not None:
            return self.zero_points[:, -1]
        return np.full(self.codes.shape[0], 1 << (self.storage_bits - 1), np.uint8)

    def packed_zero_points(self) -> U8:
        """uint8 [N, ceil(G * storage_bits / 8)], rows padded with 2^(storage_bits - 1) as ONNX Runtime does."""
        n, groups = self.scales.shape
        per_byte = 8 // self.storage_bits
        padded = np.full((n, -(-groups // per_byte) * per_byte), 1 << (self.storage_bits - 1), np.uint8)
        if self.zero_points is not None:
            padded[:, :groups] = self.zero_points
        return pack(padded, self.storage_bits)
