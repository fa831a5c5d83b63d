"""Factors of a low-rank branch as 8-bit codes: one scale for each block of a row of A or B."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.models.grid import Grid, quantize

__all__ = ["coded", "costs_nothing", "factor_grid"]

Array = NDArray[np.float64]

BLOCKS = (16, 32, 64)
LOSS = 1e-3
"""Growth of the objective up to which codes count as lossless."""


def factor_grid(width: int) -> Grid:
    """The grid of a factor whose rows have that many entries: the block that pads least and, of those, the largest."""
    return Grid(8, min(BLOCKS, key=lambda block: (-width % block, -block)))


def coded(delta: Delta) -> Delta:
    """The update with A [r, in] and c B [out, r] on their grids."""
    a, b = (quantize(factor, factor_grid(factor.shape[1])) for factor in (delta.a, delta.scale * delta.b))
    return Delta(a.dequantize().astype(np.float64), b.dequantize().astype(np.float64))


def costs_nothing(delta: Delta, difference: Array, second_moment: Array | None = None) -> bool:
    """Whether codes for the factors let ‖(ΔW - B A) S^½‖² grow by less than a thousandth; S = I if None."""
    floats, codes = (_objective(difference - one.dense(), second_moment) for one in (delta, coded(delta)))
    return codes <= (1 + LOSS) * floats


def _objective(left: Array, second_moment: Array | None) -> float:
    weighed = left if second_moment is None else left @ second_moment
    return max(0.0, float(np.einsum("nk,nk->", weighed, left)))
