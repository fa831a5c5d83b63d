"""Quantization grids of small floats, for weights alone: FP8 per output channel, NVFP4 in blocks of 16 inputs.

W [N, K] ~ value(code) s, with the values of `models.small_floats`:

* fp8: E4M3, one s > 0 per row: max |w| / 448, rounded up to eight significant bits and not below 2^−17, so that every
  float type of an engine (fp16, bf16, fp32) holds it exactly. Floats are as fine at any scale: that costs nothing.
* nvfp4: E2M1, one s per row and block of 16 inputs, s = c g with c in E4M3 and one float32 g per tensor:
  g = max |W| / (448 · 6), c = round(max |block| / (6 g)), not below the least E4M3 value, 2^−9. This is the format that
  NVIDIA describes as NVFP4 and checkpoints of compressed-tensors call by its preset, NVFP4A16.
* code = round(w / s), halves to even; beyond the largest value, that.

The search of --clip mse takes the s of least squared error instead: for fp8 from the octave above, in eight steps
(floats lose by clipping, but other scales put the largest weights nearer to their values); for nvfp4 from the ten E4M3
values down from max |block| / 4 (the largest weight may be a 4, where the values lie closer).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rqc.models.grid import CHUNK, MARGIN, Grid, parallel, quantize
from rqc.models.packing import F32, U8, Quantized, by_block
from rqc.models.small_floats import E2M1, E4M3, SmallFloat
from rqc.runtime.errors import CheckpointError, SchemeError

__all__ = ["AnyGrid", "FloatGrid", "FloatQuantized", "quantize_floats", "round_to"]

Kind = Literal["fp8", "nvfp4"]
FORMS: dict[Kind, tuple[SmallFloat, int]] = {"fp8": (E4M3, -1), "nvfp4": (E2M1, 16)}
"""Values and inputs that share a scale, by kind."""
LEAST_SCALE = np.float32(2.0**-17)
"""Eight significant bits of fp16's subnormals."""
_LEAST_CODE = 1
"""Of E4M3: 2^−9. Kernels want scales above 0."""
_OCTAVE, _BELOW_A_QUARTER = 8, 10


@dataclass(frozen=True)
class FloatGrid:
    """How a weight is quantized to small floats. unit: nvfp4's g; None: that of the weight as it is given."""

    kind: Kind
    clip: Literal["none", "mse"] = "none"
    unit: float | None = None

    def __post_init__(self) -> None:
        """Raises SchemeError for a kind or clip that there is none of."""
        if self.kind not in FORMS:
            raise SchemeError(f"weights as {self.kind!r}", hint=f"use one of {', '.join(FORMS)}")
        if self.clip not in ("none", "mse"):
            raise SchemeError(f"clip {self.clip!r}", hint="use 'none' or 'mse'")

    @property
    def form(self) -> SmallFloat:
        """The values."""
        return FORMS[self.kind][0]

    @property
    def bits(self) -> int:
        """Bits of a code, in use and in the file."""
        return self.form.bits

    storage_bits = bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1: all."""
        return FORMS[self.kind][1]

    @property
    def symmetric(self) -> bool:
        """There are no zero points."""
        return True

    @property
    def signed_scales(self) -> bool:
        """No scale is negative."""
        return False

    def block(self, k: int) -> int:
        """The block size in storage for K = k."""
        return k if self.group_size == -1 else self.group_size

    @property
    def shares(self) -> bool:
        """Whether all of a tensor shares something: nvfp4's g."""
        return self.kind == "nvfp4"

    def fitted(self, largest: float) -> FloatGrid:
        """The grid for pieces of one weight whose largest magnitude is that."""
        return FloatGrid(self.kind, self.clip, unit_of(largest))


AnyGrid = Grid | FloatGrid


@dataclass(frozen=True, eq=False)
class FloatQuantized(Quantized):
    """A weight [N, K] as codes of small floats, one to a byte, under positive scales; never a zero point.

    unit: nvfp4's g, of which every scale is an E4M3 multiple; 1 for fp8.
    """

    form: SmallFloat = E4M3
    unit: float = 1.0

    def dequantize(self) -> F32:
        """value(code) s, float32 [N, K]."""
        out = self.form.values(self.codes)
        for part, groups in by_block(out, self.block_size):
            part *= self.scales[:, groups, None]
        return out

    def rows(self, rows: slice) -> FloatQuantized:
        """These rows alone."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])

    def steps(self, w: F32) -> F32:
        """How far apart values lie about each of w, float32 [N, K]."""
        out = np.array(w, np.float32)
        for part, groups in by_block(out, self.block_size):
            scale = self.scales[:, groups, None]
            part[:] = self.form.steps(np.clip(part / scale, -self.form.top, self.form.top)) * scale
        return out

    def doubled(self) -> NDArray[np.int8]:
        """2 value(code), which is whole for E2M1: int8 [N, K]."""
        return (2 * self.form.levels).astype(np.int8)[self.codes]

    def scale_codes(self) -> U8:
        """nvfp4's c, codes of E4M3 [N, G]."""
        return E4M3.codes(self.scales / np.float32(self.unit))


def round_to(w: NDArray[Any], grid: AnyGrid) -> Quantized:
    """w [N, K] rounded to a grid of either kind. Raises CheckpointError as `quantize` does."""
    return quantize_floats(w, grid) if isinstance(grid, FloatGrid) else quantize(w, grid)


def quantize_floats(w: NDArray[Any], grid: FloatGrid, *, threads: int | None = None) -> FloatQuantized:
    """Rounds w [N, K] (cast to float32) to the grid, rows in parallel.

    Raises CheckpointError if w has a NaN, an infinity, or values that float32 can't hold.
    """
    n, k = w.shape
    with np.errstate(over="ignore"):
        largest = float(np.abs(w).max(initial=0).astype(np.float32))
    if not np.isfinite(largest):
        raise CheckpointError("a weight is not finite (NaN, infinity or beyond float32)", hint="repair the checkpoint")
    unit = 1.0 if grid.kind == "fp8" else grid.unit or unit_of(largest)
    block = grid.block(k)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, -(-k // block)), np.float32)

    def work(rows: slice) -> None:
        blocks = _cut(w[rows], block)
        scale = _best(blocks, _candidates(blocks, grid, np.float32(unit)), grid.form)
        scales[rows] = scale.reshape(-1, scales.shape[1])
        codes[rows] = grid.form.codes(blocks / scale).T.reshape(len(scales[rows]), -1)[:, :k]

    step = max(1, CHUNK // k)
    parallel(work, [slice(i, min(i + step, n)) for i in range(0, n, step)], threads)
    return FloatQuantized(codes, scales, None, grid.bits, grid.bits, block, form=grid.form, unit=unit)


def unit_of(largest: float) -> float:
    """nvfp4's g for a largest magnitude; 1 for a tensor of zeros, or of nothing that float32 can divide."""
    unit = np.float32(largest) / np.float32(E4M3.top * E2M1.top)
    return float(unit) if unit >= np.finfo(np.float32).tiny else 1.0


def _cut(w: NDArray[Any], block: int) -> F32:
    """Blocks as columns [block, n]; the last of a row is filled with zeros."""
    rows, k = w.shape
    if pad := -k % block:
        w = np.concatenate([w, np.zeros((rows, pad), w.dtype)], axis=1)
    return np.ascontiguousarray(w.reshape(-1, block).T, np.float32)


def _candidates(blocks: F32, grid: FloatGrid, unit: np.float32) -> Iterator[F32]:
    """Scales [1, n] to choose from; the first is that of the largest magnitude."""
    largest = np.abs(blocks).max(axis=0, keepdims=True)
    if grid.kind == "fp8":
        whole = largest / np.float32(E4M3.top)
        for step in range(_OCTAVE if grid.clip == "mse" else 1):
            yield _eight_bits(whole * np.float32(2.0 ** (step / _OCTAVE)))
        return
    yield _scale_of(E4M3.codes(largest / (np.float32(E2M1.top) * unit)).astype(np.int16), unit)
    if grid.clip == "mse":
        highest = E4M3.codes(largest / (np.float32(4) * unit)).astype(np.int16)
        for step in range(_BELOW_A_QUARTER):
            yield _scale_of(highest - step, unit)


def _scale_of(codes: NDArray[np.int16], unit: np.float32) -> F32:
    return E4M3.values(np.maximum(codes, _LEAST_CODE).astype(np.uint8)) * unit


def _eight_bits(scale: F32) -> F32:
    """Rounded up to eight significant bits, which are those of bfloat16, and to the least scale."""
    bits = (scale.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return np.maximum(bits.view(np.float32), LEAST_SCALE)


def _best(blocks: F32, candidates: Iterator[F32], form: SmallFloat) -> F32:
    """Of each block the scale of least squared error; the first unless another is better."""
    best = next(candidates)
    least: F32 | None = None
    for trial in candidates:
        if least is None:
            least = _error(blocks, best, form)
        error = _error(blocks, trial, form)
        better = error < least * MARGIN
        best, least = np.where(better, trial, best), np.where(better, error, least)
    return best


def _error(blocks: F32, scale: F32, form: SmallFloat) -> F32:
    """Σ (value s − w)² of each block, [1, n]."""
    off = form.nearest(blocks / scale)
    off *= scale
    off -= blocks
    error: F32 = np.square(off, out=off).sum(axis=0, keepdims=True)
    return error
