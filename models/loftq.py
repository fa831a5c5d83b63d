"""LoftQ (arXiv 2310.08659): a quantized weight and the adapter that starts from its error, fitted to each other.

min ‖W - Q - B A‖ over Q on the grid and factors of rank r, by turns: Q_t = quantize(W - B_{t-1} A_{t-1}), then B_t A_t
the truncated singular value decomposition of W - Q_t. The second half-step is an exact minimum; the first is not, since
scales follow the data, so the error can rise with t and the best t is kept.

Departures from the published code: the grid is the one that is deployed; the adapter is stored as B / c, so that
c B A is the optimum whatever c = α/r is (uncorrected, c = 2 gains nothing over no adapter and more does harm); what was
taken off W before rounding is kept in a form that gives the same bits wherever it is multiplied out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.nf4 import LevelQuantized, NormalFloat, quantize_levels
from rqc.runtime.errors import SchemeError

__all__ = ["LoftQ", "exact_factors", "loftq", "truncated_svd"]

Array = NDArray[np.float64]

_FIXED_POINT = 20
"""Bits of a stored factor below its largest entry: products of two take 40, so that up to 2^12 add up in 53 exactly."""
_NEGLIGIBLE = 1e-12
"""Relative to the largest, a singular value that is rounding error."""


@dataclass(frozen=True, eq=False)
class LoftQ:
    """The best of the iterations."""

    quantized: Quantized | LevelQuantized
    """quantize(w - residual.dense(), grid), or quantize(w, grid) without a residual, to the last bit."""
    delta: Delta
    """The adapter to start from: W ~ quantized + delta.dense(), delta.scale being c."""
    residual: Delta | None
    """What was taken off W before it was rounded; its factors are exact in float32. None at t = 1."""
    errors: tuple[float, ...]
    """‖W - Q_t - B_t A_t‖ / ‖W‖ (Frobenius) of every t that was tried, from 1."""

    @property
    def best(self) -> int:
        """The t that was kept, from 1."""
        return int(np.argmin(self.errors)) + 1


def loftq(w: Array, grid: Grid | NormalFloat, rank: int, iterations: int = 5, scale: float = 1.0) -> LoftQ:
    """Fits codes and adapter to w [out, in] (float64; rounded to float32 only by the quantizer); deterministic.

    Raises SchemeError for a rank that the layer does not have, no iterations or a scale that cannot be divided by, and
    CheckpointError if w is not finite.
    """
    _check(w, rank, iterations, scale)
    best: tuple[Quantized | LevelQuantized, Array, Array, Delta | None] | None = None
    residual: Delta | None = None
    errors: list[float] = []
    norm = float(np.linalg.norm(w)) or 1.0
    for _ in range(iterations):
        quantized = _round(w if residual is None else w - residual.dense(), grid)
        difference = w - quantized.dequantize()
        b, a = truncated_svd(difference, rank)
        difference -= b @ a
        error = float(np.linalg.norm(difference)) / norm
        if best is None or error < min(errors):
            best = quantized, b, a, residual
        errors.append(error)
        residual = exact_factors(b, a)
    assert best is not None  # there is one iteration at least
    quantized, b, a, residual = best
    return LoftQ(quantized, Delta(a, b / scale, scale), residual, tuple(errors))


def _check(w: Array, rank: int, iterations: int, scale: float) -> None:
    if not 1 <= rank <= min(w.shape):
        raise SchemeError(f"rank {rank} for a weight {list(w.shape)}", hint=f"use 1 to {min(w.shape)}")
    if iterations < 1:
        raise SchemeError(f"{iterations} iterations of LoftQ", hint="use 1 or more")
    if not math.isfinite(scale) or scale == 0:
        raise SchemeError(f"an adapter of scale {scale} cannot hold LoftQ's start", hint="choose another alpha")


def _round(w: Array, grid: Grid | NormalFloat) -> Quantized | LevelQuantized:
    return quantize_levels(w, grid) if isinstance(grid, NormalFloat) else quantize(w, grid)


def truncated_svd(matrix: Array, rank: int) -> tuple[Array, Array]:
    """B = U_r √S_r [out, r] and A = √S_r V_r [r, in], so that B A is the best approximation of that rank.

    By eigenvectors of the smaller Gram matrix: the error of B A is second order in theirs. Where the matrix has no such
    direction (B's column is 0), A's row is a unit vector, or an adapter that starts there could never learn.
    """
    if matrix.shape[0] < matrix.shape[1]:
        a, b = truncated_svd(matrix.T, rank)
        return _revived(b.T, a.T)
    vectors = np.linalg.eigh(matrix.T @ matrix)[1][:, : -rank - 1 : -1]
    images = matrix @ vectors  # U S
    values = np.linalg.norm(images, axis=0)
    values[values <= _NEGLIGIBLE * values.max(initial=0.0)] = 0
    roots = np.sqrt(values)
    b = np.divide(images, roots, out=np.zeros_like(images), where=roots > 0)
    return _revived(b, roots[:, None] * vectors.T)


def _revived(b: Array, a: Array) -> tuple[Array, Array]:
    """The factors with unit vectors for A's rows that are 0."""
    dead = ~(a.any(axis=1) & b.any(axis=0))
    if not dead.any():
        return b, a
    b, a = b.copy(), a.copy()
    b[:, dead] = 0
    a[dead] = np.eye(*a.shape)[dead]
    return b, a


def exact_factors(b: Array, a: Array) -> Delta:
    """The product as a Delta of scale 1 whose `dense()` no order of summation can change.

    Factors are rounded to multiples of 2^-20 of their largest entry (its power of two): float32 holds them, and all
    sums of their products are exact in float64. So every machine, thread count and cut into rows gets the same bits.
    """
    return Delta(_fixed_point(a), _fixed_point(b))


def _fixed_point(factor: Array) -> Array:
    largest = float(np.abs(factor).max(initial=0.0))
    if largest == 0:
        return factor
    unit = math.ldexp(1.0, math.frexp(largest)[1] - _FIXED_POINT)
    rounded: Array = np.rint(factor / unit) * unit
    return rounded
