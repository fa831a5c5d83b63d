"""Quantization grids: round-to-nearest weights in the form that MatMulNBits reads, and its 8-bit activation grid.

A weight W [N, K] (y = x W^T) is cut along K into blocks of B; every block has a scale s and a zero point z, and
W ~ (codes - z) * s. Conventions are those of ONNX Runtime's own quantizer (`MatMulNBitsQuantizer`, default algorithm),
bit for bit, all arithmetic in float32:

* symmetric: s = e / -2^(b-1), where e is the block's element of largest magnitude, *with its sign* (the negative one of
  a pair of equal magnitude), so that e lies exactly on the lowest code; s may be negative. z = 2^(storage-1).
* symmetric, positive scales (what TensorRT reads): s = max(max(w, 0) / (2^(b-1) - 1), -min(w, 0) / 2^(b-1)).
* asymmetric: s = (max(w, 0) - min(w, 0)) / (2^b - 1), z = round(-min / s).
* code = round(w * (1/s) + z), halves away from zero, clamped. A block of zeros has s = 0 and codes z.

Widths without a storage of their own use the codes around the centre of the next storage: 3 bits are the codes 4..11 of
4, 6 bits are 96..159 of 8. A clip search shrinks the range per block to that of least squared error, as the published
code of GPTQ (arXiv 2210.17323) does with its `mse` option.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rqc.models.packing import F32, U8, Quantized, by_block
from rqc.runtime.errors import CheckpointError, SchemeError

__all__ = ["Grid", "Quantized", "activation_codes", "fake_quantize_activations", "quantize"]

STORAGE_BITS = {2: 2, 3: 4, 4: 4, 6: 8, 8: 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What MatMulNBits' CPU kernel accepts."""

CHUNK = 1 << 18
"""Weights per work item (1 MiB as float32): it fits the caches, and threads rarely queue for the interpreter's lock."""
_RATIO = {2: 0.96, 3: 0.96, 4: 0.975, 6: 0.99, 8: 0.995}
"""Factor between the ranges that a clip search tries: the finer the grid, the less it gains by clipping."""
_PATIENCE = 6
_MAX_ROUNDS = 100
MARGIN = np.float32(1 - 1e-5)
"""A ratio must win by more than float32 sums can err, so that no block is ever worse than without clipping."""
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""trunc(t + _BELOW_HALF) is C's roundf(t) for 0 <= t < 2**22; with 0.5 itself, 0.49999997 would round up."""


@dataclass(frozen=True)
class Grid:
    """How a weight is quantized: `bits` per code, one scale per `group_size` inputs (-1: per output channel).

    positive: no scale of a symmetric grid is negative.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    clip: Literal["none", "mse"] = "none"
    positive: bool = False

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
    def signed_scales(self) -> bool:
        """Whether scales may be negative."""
        return self.symmetric and not self.positive

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


def quantize(w: npt.NDArray[Any], grid: Grid, *, threads: int | None = None) -> Quantized:
    """Rounds w [N, K] (cast to float32) to the grid, rows in parallel; each row's result depends on that row alone.

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
        # A cast or a range beyond float32 makes the scale infinite, which is an error; an error sum, a ratio not taken.
        with np.errstate(over="ignore", invalid="ignore"):
            q, scale, zero = _quantize_blocks(_Blocks.cut(w[rows], group), grid)
        scales[rows] = scale.reshape(-1, groups)
        codes[rows] = q.reshape(len(scales[rows]), -1)[:, :k]
        if zeros is not None:
            zeros[rows] = zero.reshape(-1, groups)

    step = max(1, CHUNK // k)
    parallel(work, [slice(i, min(i + step, n)) for i in range(0, n, step)], threads)
    if grid.group_size == -1:
        repeat = -(-k // block)
        scales = np.repeat(scales, repeat, axis=1)
        zeros = None if zeros is None else np.repeat(zeros, repeat, axis=1)
    return Quantized(codes, scales, zeros, grid.bits, grid.storage_bits, block)


def parallel(work: Callable[[slice], None], items: list[slice], threads: int | None) -> None:
    """Calls work on every item, on `threads` threads (default: the CPUs this process may use)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(len(items), threads or available or 1)
    if count <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, items))


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Blocks of weights, laid out for speed: [B, n] (axis 0) where they are short, else [n, B] (axis 1)."""

    w: F32
    axis: int
    """The axis along a block; statistics keep it with size 1."""

    @classmethod
    def cut(cls, w: npt.NDArray[Any], group: int) -> _Blocks:
        """Cuts w [r, K] into blocks of `group`; the last of a row is filled with zeros.

        Zeros neither widen a range that must hold 0 nor err when rounded, so they change nothing.
        """
        rows, k = w.shape
        pad = -k % group
        if pad:
            w = np.concatenate([w, np.zeros((rows, pad), w.dtype)], axis=1)
        w = w.reshape(-1, group)
        if group > BLOCK_SIZES[-1]:
            return cls(np.ascontiguousarray(w, dtype=np.float32), 1)
        return cls(np.ascontiguousarray(w.T, dtype=np.float32), 0)

    def sum(self, t: F32) -> F32:
        """The sum of t over each block, in an order that depends on B alone; destroys t."""
        if self.axis == 1:
            return np.add.reduce(t, axis=1, keepdims=True)
        size = t.shape[0]
        while size > 1:
            half = size // 2
            t[:half] += t[size - half : size]
            size -= half
        return t[:1]


def _quantize_blocks(blocks: _Blocks, grid: Grid) -> tuple[U8, F32, F32]:
    """Codes [n, B], scales and zero points [n, 1] or [1, n] of n blocks."""
    scale, zero = _range(blocks, grid)
    if grid.clip == "mse":
        scale = _clip_search(blocks, scale, zero, grid)
    codes = _round(blocks.w, scale, zero, grid, np.empty_like(blocks.w)).astype(np.uint8)
    return (codes if blocks.axis else codes.T), scale, zero


def _range(blocks: _Blocks, grid: Grid) -> tuple[F32, F32]:
    """Scales and zero points that cover the range of every block."""
    low = blocks.w.min(axis=blocks.axis, keepdims=True)
    high = blocks.w.max(axis=blocks.axis, keepdims=True)
    if grid.symmetric and grid.positive:
        half = 1 << (grid.bits - 1)
        scale = np.maximum(np.maximum(high, 0) / np.float32(half - 1), np.minimum(low, 0) / np.float32(-half))
    elif grid.symmetric:
        extreme = np.where(np.abs(high) > np.abs(low), high, low)
        scale = extreme / np.float32(-(1 << (grid.bits - 1)))
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / np.float32((1 << grid.bits) - 1)
    if not np.isfinite(scale).all():
        raise CheckpointError("a weight is not finite (NaN, infinity or beyond float32)", hint="repair the checkpoint")
    # The reciprocal of a subnormal scale overflows: such a block is zero (a negative one where ONNX Runtime's is).
    scale[np.abs(scale) < np.finfo(np.float32).tiny] = -0.0 if grid.signed_scales else 0.0
    zero = np.full_like(scale, grid.center)
    if not grid.symmetric:
        ratio = np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0)
        lowest, highest = grid.code_range
        zero = lowest + np.trunc(np.clip(ratio, 0, highest - lowest) + _BELOW_HALF)
    return scale, zero


def _round(w: F32, scale: F32, zero: F32, grid: Grid, out: F32) -> F32:
    """Sets out to the codes of w plus a fraction in [0, 1), which truncation takes off."""
    lowest, highest = grid.code_range
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    np.multiply(w, inverse, out=out)
    out += zero
    np.clip(out, np.float32(lowest), np.float32(highest), out=out)
    out += _BELOW_HALF
    return out


def _clip_search(blocks: _Blocks, scale: F32, zero: F32, grid: Grid) -> F32:
    """Scales shrunk, block by block, to about the least sum of (dequantized - w)^2.

    Ratios fall geometrically from 1 until a block has found nothing better `_PATIENCE` times in a row. That goes as
    deep as a block needs (short blocks of 4 bits rarely pass 0.8, rows of 2 bits pass 0.4) and no deeper.
    """
    w, ratio = blocks.w, 1.0
    best_scale, best_round = scale, np.zeros(scale.shape, np.int32)
    best = np.full(scale.shape, np.inf, np.float32)
    t = np.empty_like(w)
    for step in range(_MAX_ROUNDS):
        trial = scale * np.float32(ratio)
        np.floor(_round(w, trial, zero, grid, t), out=t)
        t -= zero
        t *= trial
        t -= w
        error = blocks.sum(np.square(t, out=t))
        searching = step - best_round <= _PATIENCE
        if not searching.any():
            break
        better = searching & (error < best * MARGIN)
        best = np.where(better, error, best)
        best_scale = np.where(better, trial, best_scale)
        best_round[better] = step
        ratio *= _RATIO[grid.bits]
    return best_scale


def activation_codes(x: npt.NDArray[Any], block: int, bits: int = 8) -> tuple[npt.NDArray[np.int8], F32]:
    """The activation grid of MatMulNBits at accuracy_level=4: int8 codes [..., K] and float32 scales [..., G].

    Dynamic and symmetric, per token and block of K (-1: one block per token): with m the block's largest magnitude and
    t = 2^(bits-1) - 1, scale = m / t and code = x * (t / m) rounded half to even. A last block that K doesn't fill
    counts what it has.
    """
    x = np.asarray(x, np.float32)
    k = x.shape[-1]
    block = k if block == -1 else block
    top = np.float32((1 << (bits - 1)) - 1)
    codes = np.empty(x.shape, np.int8)
    scales = np.empty((*x.shape[:-1], -(-k // block)), np.float32)
    for (part, groups), (out, _) in zip(by_block(x, block), by_block(codes, block), strict=True):
        largest = np.abs(part).max(axis=-1, keepdims=True)
        # Below this the reciprocal overflows: such a block is zero.
        inverse = np.divide(top, largest, out=np.zeros_like(largest), where=largest > top / np.finfo(np.float32).max)
        np.rint(part * inverse, out=out, casting="unsafe")
        scales[..., groups] = largest[..., 0] / top
    return codes, scales


def fake_quantize_activations(x: npt.NDArray[Any], block: int, bits: int = 8) -> F32:
    """x [..., K] rounded to the grid of `activation_codes`, float32."""
    codes, scales = activation_codes(x, block, bits)
    out = codes.astype(np.float32)
    for part, groups in by_block(out, x.shape[-1] if block == -1 else block):
        part *= scales[..., groups, None]
    return out
