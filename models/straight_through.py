"""Rounding in PyTorch with a gradient: tokens and weights on the grids of an engine.

A code's own rounding counts as the identity (a straight-through estimator); all else is derived as it stands. So with
x ≈ c s the gradient reaches x through its code and, with c − x / s, through the scale s, as in LSQ (Esser et al., arXiv
1902.08153): by this term the largest value of a token or block learns what its extent costs all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rqc.models.grid import Grid
from rqc.models.token_grid import TINY, TokenGrid
from rqc.runtime.errors import SchemeError


class _Nearest(torch.autograd.Function):
    """The nearest whole number, halves to even; backward the identity."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _nearest(x: Tensor) -> Tensor:
    found: Tensor = _Nearest.apply(x)  # type: ignore[no-untyped-call]
    return found


def round_tokens(x: Tensor, grid: TokenGrid) -> Tensor:
    """x [..., K] as `TokenGrid.round` has it, in the type of x."""
    wide = x.float()
    if grid.symmetric:
        scale = _scales(wide.abs().amax(-1, keepdim=True), grid)
        bottom = torch.full_like(scale, -grid.limit - 1)
    else:
        lowest = wide.amin(-1, keepdim=True).clamp_max(0)
        scale = _scales(wide.amax(-1, keepdim=True).clamp_min(0) - lowest, grid)
        bottom = _nearest(lowest / scale * grid.clip)
    codes = torch.clamp(_nearest(wide / scale), bottom, bottom + grid.steps)
    return (codes * scale).to(x.dtype)


def _scales(extent: Tensor, grid: TokenGrid) -> Tensor:
    return (extent / float(grid.divisor)).clamp_min(float(TINY))


def round_weight(w: Tensor, grid: Grid) -> Tensor:
    """w [N, K] rounded to nearest on a weight's grid with unclipped ranges, in the type of w.

    The codes are those of `rqc.models.grid.quantize`, but for ties. Raises SchemeError for a grid that clips.
    """
    if grid.clip != "none" or grid.positive:
        raise SchemeError(f"a gradient through {grid}", hint="a grid without clipping and with scales of either sign")
    n, k = w.shape
    group = k if grid.group_size == -1 else grid.group_size
    blocks = nn.functional.pad(w.float(), (0, -k % group)).reshape(n, -1, group)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    lowest, highest = (code - grid.center for code in grid.code_range)
    if grid.symmetric:
        scale, zero = torch.where(high.abs() > low.abs(), high, low) / lowest, torch.zeros_like(low)
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / (highest - lowest)
        zero = lowest + _nearest(-low / torch.where(scale > 0, scale, 1))
    inverse = torch.where(scale.abs() < float(TINY), 0, 1 / torch.where(scale == 0, 1, scale))
    codes = torch.clamp(_nearest(blocks * inverse + zero), lowest, highest)
    return ((codes - zero) * scale).reshape(n, -1)[:, :k].to(w.dtype)
