"""GPTQ (arXiv 2210.17323): round a weight column by column, each error made good by the columns that are still open.

min Σ ‖(W − Ŵ) x‖² over Ŵ on the grid. With H = Σ x xᵀ + λ I and U the upper Cholesky factor of H⁻¹, column k is rounded
and its error e_k = (w_k − ŵ_k) / U_kk is taken off the columns behind it: w_j ← w_j − e_k U_kj.

Departures from the published code: columns are ordered by their energy H_kk, but only groups as a whole and columns
inside a group, so that a group keeps its place, its scale, and its kernel (no index of groups); a row keeps the
rounding to nearest where that is better under H, so that no row of any layer is ever worse; a column that no token
reaches is rounded to nearest and touches no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqc.models.grid import Grid, quantize
from rqc.models.moments import error_of
from rqc.models.packing import Quantized
from rqc.runtime.errors import CheckpointError

__all__ = ["Order", "better_rows", "gptq"]

COLUMNS = 32
"""Columns whose errors are gathered before they reach the rest of the matrix."""
DAMPENING = 0.01
"""λ in parts of the mean of the diagonal; ten times more after each factorisation that fails."""
ATTEMPTS = 5
ALONE = 4096
"""Columns below which a factorisation runs on one thread: a moment alone, many times that where threads must wait."""
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Order:
    """Second moments of one input, factored for GPTQ: shared by all linears that read it.

    moments: [K, K], symmetric, float32. columns: the order in which they are rounded, groups whole. factor: U [K, K] in
    that order, float32.
    """

    moments: F32
    columns: NDArray[np.intp]
    factor: F32

    @classmethod
    def of(cls, moments: NDArray[np.float64], group: int) -> Order:
        """Factor second moments for groups of that many columns. Raises CheckpointError if that cannot be done."""
        columns = _by_energy(np.diagonal(moments).copy(), group)
        return cls(moments.astype(np.float32), columns, _factor(moments, columns))


def _by_energy(energy: NDArray[np.float64], group: int) -> NDArray[np.intp]:
    """Columns by falling energy inside groups, groups by falling energy of their mean. A last group that is not whole
    stays the last."""
    k = len(energy)
    starts = range(0, k, group)
    means = [float(energy[start : start + group].mean()) if start + group <= k else -1.0 for start in starts]
    groups = sorted(range(len(starts)), key=lambda index: -means[index])
    inside = (
        index * group + np.argsort(-energy[index * group : (index + 1) * group], kind="stable") for index in groups
    )
    return np.concatenate(list(inside))


def _factor(moments: NDArray[np.float64], columns: NDArray[np.intp]) -> F32:
    """U with (moments + λ I)⁻¹ = Uᵀ U, columns reordered. In float32 where that works, in float64 or with a larger λ
    where it does not."""
    mean = float(np.diagonal(moments).mean())
    if not np.isfinite(mean):
        raise CheckpointError("its second moments are not finite", hint="repair the checkpoint")
    share = DAMPENING
    for _ in range(ATTEMPTS):
        for dtype in (np.float32, np.float64):
            h = torch.from_numpy(moments.astype(dtype)[np.ix_(columns, columns)])
            h.diagonal().add_(share * (mean or 1.0))
            found = _inverse_factor(h)
            if found is not None:
                return found.numpy()
        share *= 10
    raise CheckpointError("its second moments have no Cholesky factor", hint="calibrate on more text")


def _inverse_factor(h: Tensor) -> Tensor | None:
    """U with h⁻¹ = Uᵀ U; None where h is not positive definite to the precision of its type."""
    with _threads(1 if len(h) < ALONE else torch.get_num_threads()):
        lower, failed = torch.linalg.cholesky_ex(h)
        if failed:
            return None
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed or not bool(torch.isfinite(upper).all()):
        return None
    found: Tensor = upper.float()
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gptq(w: NDArray[Any], order: Order, grid: Grid, keep: NDArray[np.bool_] | None = None) -> Quantized:
    """Codes, scales and zero points for w [N, K] on `grid`; with `keep` [N, K], what it leaves out becomes zero.

    No row's Σ ‖(w − ŵ) x‖² under the order's moments is above that of rounding to nearest. Raises CheckpointError if w
    is not finite.
    """
    plain = np.asarray(w, np.float32)
    nearest = quantize(plain if keep is None else np.where(keep, plain, 0), grid)
    found = _Solver(nearest, grid, order, keep).solve(plain)
    before, after = (error_of(plain - one.dequantize(), order.moments) for one in (nearest, found))
    return better_rows(nearest, found, before <= after)


def better_rows(first: Quantized, second: Quantized, choose_first: NDArray[np.bool_]) -> Quantized:
    """Row by row one of two roundings on the same grid."""
    pick = choose_first[:, None]
    zeros = None
    if first.zero_points is not None and second.zero_points is not None:
        zeros = np.where(pick, first.zero_points, second.zero_points)
    codes, scales = np.where(pick, first.codes, second.codes), np.where(pick, first.scales, second.scales)
    return replace(first, codes=codes, scales=scales, zero_points=zeros)


@dataclass(eq=False)
class _Solver:
    """One run over the columns. like: a rounding of the same weight, whose form the result has.

    Everything lies column by column in memory, and is done without threads of its own: these would wait for each other
    at every column.
    """

    like: Quantized
    grid: Grid
    order: Order
    keep: NDArray[np.bool_] | None

    def solve(self, w: F32) -> Quantized:
        columns, factor, group = self.order.columns, self.order.factor, self.like.block_size
        open_ = np.ascontiguousarray(w[:, columns].T)
        keep = None if self.keep is None else np.ascontiguousarray(self.keep[:, columns].T)
        codes = np.empty(w.shape, np.uint8)
        scales, zeros = self._start()
        for block in _slices(len(columns), COLUMNS):
            errors = np.empty_like(open_[block])
            for at in range(block.start, block.stop):
                index = columns[at] // group
                if self.grid.group_size != -1 and at % group == 0:
                    scales[index], zeros[index] = self._fit(open_[at : at + group])
                code = self._round(open_[at], scales[index], zeros[index])
                if keep is not None:
                    code = np.where(keep[at], code, zeros[index])
                codes[:, columns[at]] = code
                error = (open_[at] - (code - zeros[index]) * scales[index]) / factor[at, at]
                errors[at - block.start] = error
                open_[at + 1 : block.stop] -= factor[at, at + 1 : block.stop, None] * error
            open_[block.stop :] -= factor[block, block.stop :].T @ errors
        found = None if self.like.zero_points is None else zeros.T.astype(np.uint8)
        return replace(self.like, codes=codes, scales=np.ascontiguousarray(scales.T), zero_points=found)

    def _start(self) -> tuple[F32, F32]:
        """Scales and zero points [G, N] of rounding to nearest, which whole rows keep."""
        zeros = self.like.stored_zero_points().astype(np.float32)
        return np.ascontiguousarray(self.like.scales.T), np.ascontiguousarray(zeros.T)

    def _fit(self, columns: F32) -> tuple[F32, NDArray[np.uint8]]:
        """Scales and zero points [N] of a group from its columns [B, N] as they are now."""
        fitted = quantize(columns.T, self.grid, threads=1)
        return fitted.scales[:, 0], fitted.stored_zero_points()[:, 0]

    def _round(self, column: F32, scale: F32, zero: F32) -> F32:
        """The nearest codes, as `quantize` has them."""
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        lowest, highest = self.grid.code_range
        codes: F32 = np.floor(np.clip(column * inverse + zero, lowest, highest) + BELOW_HALF)
        return codes


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
