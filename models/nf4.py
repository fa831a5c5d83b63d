"""NormalFloat: codes that index levels at the quantiles of a normal distribution, for training and error studies.

NF4 of QLoRA (arXiv 2305.14314) and its other widths as LoftQ's published code makes them. No engine format reads such
codes; `rqc compile` refuses an adapter whose base they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from rqc.models.packing import F32, U8, by_block, pack
from rqc.runtime.errors import CheckpointError, SchemeError

__all__ = ["LevelQuantized", "NormalFloat", "quantize_levels"]

_TAIL = 0.9677083
"""Probability at the outermost level: the mean of 1 - 1/30 and 1 - 1/32, as bitsandbytes has it."""


@dataclass(frozen=True)
class NormalFloat:
    """NF-b: `bits` per code, one scale (the largest magnitude) per `block` inputs of a row."""

    bits: int = 4
    block_size: int = 64

    def __post_init__(self) -> None:
        """Raises SchemeError for a width or block that cannot be packed."""
        if self.bits not in (2, 4):
            raise SchemeError(f"NormalFloat of {self.bits} bits", hint="use 2 or 4")
        if self.block_size < 16 or self.block_size % 16:
            raise SchemeError(f"NormalFloat in blocks of {self.block_size}", hint="use a multiple of 16")

    @property
    def levels(self) -> F32:
        """float32 [2^bits] in [-1, 1], ascending."""
        return _levels(self.bits)


@cache
def _levels(bits: int) -> F32:
    """Quantiles at probabilities evenly spaced from the tail to 1/2: 2^b/2 above zero, zero, 2^b/2 - 1 below it."""
    half = 1 << (bits - 1)
    quantile = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])
    above = quantile(np.linspace(_TAIL, 0.5, half + 1)[:-1])
    below = -quantile(np.linspace(_TAIL, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    result: F32 = (levels / levels.max()).astype(np.float32)
    result.setflags(write=False)
    return result


@dataclass(frozen=True, eq=False)
class LevelQuantized:
    """A weight [N, K] as codes into a table of levels; G = ceil(K / block_size)."""

    codes: U8
    """[N, K]."""
    scales: F32
    """[N, G]."""
    levels: F32
    """[2^bits]."""
    bits: int
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> F32:
        """levels[codes] * s, float32 [N, K]."""
        out: F32 = self.levels[self.codes]
        for part, groups in by_block(out, self.block_size):
            part *= self.scales[:, groups, None]
        return out

    def packed_codes(self) -> U8:
        """uint8 [N, G, block_size * bits / 8], low bits first; K is padded with code 0."""
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        padded = np.zeros((n, groups * self.block_size), np.uint8)
        padded[:, :k] = self.codes
        return pack(padded, self.bits).reshape(n, groups, -1)


def quantize_levels(w: npt.NDArray[Any], grid: NormalFloat) -> LevelQuantized:
    """Rounds w [N, K] (cast to float32) to the nearest level of each block, scaled by the block's largest magnitude.

    bitsandbytes cuts the flattened weight; here blocks end with their row, which is the same where the block divides K.
    Raises CheckpointError if w has a NaN, an infinity or values beyond float32.
    """
    with np.errstate(over="ignore"):
        w = np.array(w, np.float32)
    n, k = w.shape
    scales = np.empty((n, -(-k // grid.block_size)), np.float32)
    codes = np.empty((n, k), np.uint8)
    middles = (grid.levels[1:] + grid.levels[:-1]) / np.float32(2)
    for (part, groups), (out, _) in zip(by_block(w, grid.block_size), by_block(codes, grid.block_size), strict=True):
        largest = np.abs(part).max(axis=-1)
        if not np.isfinite(largest).all():
            raise CheckpointError("a weight is not finite (NaN or infinity)", hint="repair the checkpoint")
        scales[:, groups] = largest
        unit = np.divide(part, largest[..., None], out=np.zeros_like(part), where=largest[..., None] != 0)
        out[...] = np.searchsorted(middles, unit)
    return LevelQuantized(codes, scales, grid.levels, grid.bits, grid.block_size)
