"""Quantization grids: round-to-nearest weights in the form that MatMulNBits reads, and its 8-bit activation grid.

A weight W [N, K] (y = x W^T) is cut along K into blocks of B; every block has a scale s and a zero point z, and
W ~ (codes - z) * s. Conventions are those of ONNX Runtime's own quantizer (`MatMulNBitsQuantizer`, default algorithm), bit for
bit, all arithmetic in float32:

* symmetric: s = e / -2^(b-1), where e is the block's element of largest magnitude, *with its sign* (the negative one of a pair
  of equal magnitude), so that e lies exactly on the lowest code; s may be negative. z = 2^(storage-1).
* asymmetric: s = (max(w, 0) - min(w, 0)) / (2^b - 1), z = round(-min / s).
* code = round(w * (1/s) + z), halves away from zero, clamped. A block of zeros has s = 0 and codes z.

Widths without a storage of their own use the codes around the centre of the next storage: 3 bits are the codes 4..11 of 4,
6 bits are 96..159 of 8. A clip search (the range shrunk per block to the ratio of least squared error) follows OCTAV's aim
(arXiv 2206.06501) by enumeration, as GPTQ's `mse` option does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rqc.models.packing import pack
from rqc.runtime.errors import CheckpointError, SchemeError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

STORAGE_BITS = {2: 2, 3: 4, 4: 4, 6: 8, 8: 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What MatMulNBits' CPU kernel accepts."""

_CHUNK = 1 << 16
"""Weights per work item: two float32 buffers of it fit the second-level cache."""
_RATIOS = np.linspace(1.0, 0.5, 21, dtype=np.float32)[1:]
_MARGIN = np.float32(1 - 1e-5)
"""A ratio must win by more than float32 sums can err, so that no block is ever worse than without clipping."""
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""trunc(t + _BELOW_HALF) is C's roundf(t) for 0 <= t < 2**22; with 0.5 itself, 0.49999997 would round up."""


@dataclass(frozen=True)
class Grid:
    """How a weight is quantized: `bits` per code, one scale per `group_size` inputs (-1: per output channel)."""

    bits: int
    group_size: int
    symmetric: bool = True
    clip: Literal["none", "mse"] = "none"

    def __post_init__(self) -> None:
        """Raises SchemeError for a width, group size or clip that no kernel reads."""
        if self.bits not in STORAGE_BITS:
            raise SchemeError(f"weights of {self.bits} bits", hint=f"use one of {', '.join(map(str, STORAGE_BITS))}")
        if self.group_size not in (-1, *BLOCK_SIZES):
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise SchemeError(f"group size {self.group_size}", hint=f"use one of {sizes} or -1 (per output channel)")
        if self.clip not in ("none", "mse"):
            raise SchemeError(f"clip {self.clip!r}", hint="use 'none' or 'mse'")

    @property
    def storage_bits(self) -> int:
        """Bits that a code takes in the file."""
        return STORAGE_BITS[self.bits]

    @property
    def center(self) -> int:
        """The zero point of symmetric grids: what MatMulNBits assumes where none is given."""
        return int(1 << (self.storage_bits - 1))

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code in use."""
        half = 1 << (self.bits - 1)
        return self.center - half, self.center + half - 1

    def block(self, k: int) -> int:
        """The block size in storage for K = k; per channel, the one that pads least and, of those, the largest."""
        if self.group_size != -1:
            return self.group_size
        return min(BLOCK_SIZES, key=lambda b: (-k % b, -b))


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

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> F32:
        """(codes - z) * s, float32 [N, K]."""
        out = self.codes.astype(np.float32)
        zero = self.zero_points if self.zero_points is not None else np.uint8(1 << (self.storage_bits - 1))
        for part, groups in _by_block(out, self.block_size):
            part -= zero if np.ndim(zero) == 0 else zero[:, groups, None]
            part *= self.scales[:, groups, None]
        return out

    def packed_codes(self) -> U8:
        """uint8 [N, G, block_size * storage_bits / 8], low bits first; K is padded with the block's zero point."""
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        padded = self.codes
        if groups * self.block_size != k:
            padded = np.full((n, groups * self.block_size), 1 << (self.storage_bits - 1), np.uint8)
            padded[:, :k] = self.codes
            if self.zero_points is not None:
                padded[:, k:] = self.zero_points[:, -1:]
        return pack(padded, self.storage_bits).reshape(n, groups, -1)

    def packed_zero_points(self) -> U8:
        """uint8 [N, ceil(G * storage_bits / 8)], rows padded with 2^(storage_bits - 1) as ONNX Runtime does."""
        n, groups = self.scales.shape
        per_byte = 8 // self.storage_bits
        padded = np.full((n, -(-groups // per_byte) * per_byte), 1 << (self.storage_bits - 1), np.uint8)
        if self.zero_points is not None:
            padded[:, :groups] = self.zero_points
        return pack(padded, self.storage_bits)


def _by_block(x: npt.NDArray[Any], block: int) -> list[tuple[npt.NDArray[Any], slice]]:
    """Views of x [..., K] as [..., G, block] with the slice of groups they cover: the whole blocks, then the rest."""
    k = x.shape[-1]
    whole = k // block
    views = []
    if whole:
        views.append((x[..., : whole * block].reshape(*x.shape[:-1], whole, block), slice(0, whole)))
    if whole * block < k:
        views.append((x[..., None, whole * block :], slice(whole, whole + 1)))
    return views


def quantize(w: npt.NDArray[Any], grid: Grid, *, threads: int | None = None) -> Quantized:
    """Rounds w [N, K] (cast to float32) to the grid, rows in parallel; the result doesn't depend on `threads`.

    Raises CheckpointError if w has a NaN, an infinity, or a range that float32 can't hold.
    """
    n, k = w.shape
    block = grid.block(k)
    group = k if grid.group_size == -1 else block
    groups = -(-k // group)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, groups), np.float32)
    zeros = None if grid.symmetric else np.empty((n, groups), np.uint8)

    def work(rows: slice) -> None:
        blocks = _blocks_first(w[rows], group)
        q, s, z = _quantize_blocks(blocks, grid)
        count = s.size // groups
        codes[rows] = q.T.reshape(count, -1)[:, :k]
        scales[rows] = s.reshape(count, groups)
        if zeros is not None:
            zeros[rows] = z.reshape(count, groups)

    step = max(1, _CHUNK // k)
    _parallel(work, [slice(i, min(i + step, n)) for i in range(0, n, step)], threads)
    if grid.group_size == -1:
        repeat = -(-k // block)
        scales = np.repeat(scales, repeat, axis=1)
        zeros = None if zeros is None else np.repeat(zeros, repeat, axis=1)
    return Quantized(codes, scales, zeros, grid.bits, grid.storage_bits, block)


def _parallel(work: Callable[[slice], None], items: list[slice], threads: int | None) -> None:
    """Calls work on every item, on `threads` threads (default: the CPUs this process may use)."""
    count = min(len(items), threads or len(os.sched_getaffinity(0)))
    if count <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, items))


def _blocks_first(w: npt.NDArray[Any], group: int) -> F32:
    """w [r, K] as float32 [group, r * G]: one column per block, zeros at the end of a row's last one.

    Zeros neither widen a range that must hold 0 nor err when rounded, so they change nothing.
    """
    rows, k = w.shape
    pad = -k % group
    if pad:
        padded = np.zeros((rows, k + pad), np.float32)
        padded[:, :k] = w
        w = padded
    return np.ascontiguousarray(w.reshape(-1, group).T, dtype=np.float32)


def _quantize_blocks(w: F32, grid: Grid) -> tuple[U8, F32, F32]:
    """Codes [B, n], scales [n] and zero points [n] of the blocks w [B, n]."""
    scale, zero = _range(w, grid)
    if grid.clip == "mse":
        scale = _clip_search(w, scale, zero, grid)
    t = np.empty_like(w)
    _round(w, scale, zero, grid, t)
    return t.astype(np.uint8), scale, zero


def _range(w: F32, grid: Grid) -> tuple[F32, F32]:
    """Scales and zero points [n] that cover the range of the blocks w [B, n]."""
    low, high = w.min(axis=0), w.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        if grid.symmetric:
            extreme = np.where(np.abs(high) > np.abs(low), high, low)
            scale = extreme / np.float32(-(1 << (grid.bits - 1)))
        else:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scale = (high - low) / np.float32((1 << grid.bits) - 1)
    if not np.isfinite(scale).all():
        raise CheckpointError("a weight is not finite (NaN, infinity or beyond float32)", hint="repair the checkpoint")
    # The reciprocal of a subnormal scale overflows: such a block is zero (a negative one where ONNX Runtime's is).
    scale[np.abs(scale) < np.finfo(np.float32).tiny] = -0.0 if grid.symmetric else 0.0
    zero = np.full_like(scale, grid.center)
    if not grid.symmetric:
        ratio = np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0)
        lowest, highest = grid.code_range
        zero = lowest + np.trunc(np.clip(ratio, 0, highest - lowest) + _BELOW_HALF)
    return scale, zero


def _round(w: F32, scale: F32, zero: F32, grid: Grid, out: F32) -> None:
    """Sets out to the codes of w plus a fraction in [0, 1): truncation makes them integers."""
    lowest, highest = grid.code_range
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    np.multiply(w, inverse, out=out)
    out += zero
    np.clip(out, np.float32(lowest), np.float32(highest), out=out)
    out += _BELOW_HALF


def _clip_search(w: F32, scale: F32, zero: F32, grid: Grid) -> F32:
    """Scales [n] shrunk by the ratio that minimises each block's sum of (dequantized - w)^2; ties keep the larger."""
    best_scale = scale
    best = np.full(scale.shape, np.inf, np.float32)
    t = np.empty_like(w)
    with np.errstate(over="ignore"):
        for ratio in (np.float32(1), *_RATIOS):
            trial = scale * ratio
            _round(w, trial, zero, grid, t)
            np.floor(t, out=t)
            t -= zero
            t *= trial
            t -= w
            np.square(t, out=t)
            error = _sum(t)
            better = error < best * _MARGIN
            best = np.where(better, error, best)
            best_scale = np.where(better, trial, best_scale)
    return best_scale


def _sum(t: F32) -> F32:
    """Sums t [B, n] over its first axis by halves, in place: an order that depends on B alone."""
    size = t.shape[0]
    while size > 1:
        half = size // 2
        t[:half] += t[size - half : size]
        size -= half
    return t[0]


def activation_codes(x: npt.NDArray[Any], block: int, bits: int = 8) -> tuple[npt.NDArray[np.int8], F32]:
    """Dynamic symmetric activation grid of MatMulNBits at accuracy_level=4: int8 codes [..., K], float32 scales [..., G].

    Per token and block of K (-1: one block per token): scale = absmax / (2^(bits-1) - 1), code = x * (1 / scale) rounded half
    to even. A last block that K doesn't fill counts what it has.
    """
    x = np.asarray(x, np.float32)
    k = x.shape[-1]
    block = k if block == -1 else block
    top = np.float32((1 << (bits - 1)) - 1)
    codes = np.empty(x.shape, np.int8)
    scales = np.empty((*x.shape[:-1], -(-k // block)), np.float32)
    for (part, groups), (out, _) in zip(_by_block(x, block), _by_block(codes, block), strict=True):
        absmax = np.abs(part).max(axis=-1, keepdims=True)
        inverse = np.divide(top, absmax, out=np.zeros_like(absmax), where=absmax != 0)
        out[...] = np.rint(part * inverse).astype(np.int8)
        scales[..., groups] = absmax[..., 0] / top
    return codes, scales


def fake_quantize_activations(x: npt.NDArray[Any], block: int, bits: int = 8) -> F32:
    """x rounded to `activation_codes`' grid, float32 of x's shape."""
    codes, scales = activation_codes(x, block, bits)
    out = codes.astype(np.float32)
    for part, groups in _by_block(out, x.shape[-1] if block == -1 else block):
        part *= scales[..., groups, None]
    return out
