"""Rounding in PyTorch whose gradient is that of the identity: tokens and weights on the grids of an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rqc.models.grid import Grid
from rqc.models.token_grid import TINY, TokenGrid
from rqc.runtime.errors import SchemeError


class _Straight(torch.autograd.Function):
    """`rounded` forward; backward the identity, where nothing was cut off."""

    @staticmethod
    def forward(context: Any, x: Tensor, rounded: Tensor, kept: Tensor | None) -> Tensor:
        context.save_for_backward(kept)
        return rounded.to(x.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = context.saved_tensors
        return gradients[0] if kept is None else gradients[0] * kept, None, None


def _straight(x: Tensor, rounded: Tensor, kept: Tensor | None) -> Tensor:
    out: Tensor = _Straight.apply(x, rounded, kept)  # type: ignore[no-untyped-call]
    return out


def round_tokens(x: Tensor, grid: TokenGrid) -> Tensor:
    """x [..., K] as `TokenGrid.round` has it, in the type of x. The gradient passes but where clipping cut x off."""
    with torch.no_grad():
        wide = x.float()
        if grid.symmetric:
            scale = _scales(wide.abs().amax(-1, keepdim=True), grid)
            bottom = torch.full_like(scale, -grid.limit - 1)
        else:
            lowest = wide.amin(-1, keepdim=True).clamp_max(0)
            scale = _scales(wide.amax(-1, keepdim=True).clamp_min(0) - lowest, grid)
            bottom = torch.round(lowest / scale * grid.clip)
        codes = torch.round(wide / scale)
        cut = torch.clamp(codes, bottom, bottom + grid.steps)
        kept = None if grid.clip == 1 else codes == cut
    return _straight(x, cut * scale, kept)


def _scales(extent: Tensor, grid: TokenGrid) -> Tensor:
    return (extent / float(grid.divisor)).clamp_min(float(TINY))


def round_weight(w: Tensor, grid: Grid) -> Tensor:
    """w [N, K] rounded to nearest on a weight's grid with unclipped ranges, in the type of w; the gradient passes.

    The codes are those of `rqc.models.grid.quantize`, but for ties. Raises SchemeError for a grid that clips.
    """
    if grid.clip != "none" or grid.positive:
        raise SchemeError(f"a gradient through {grid}", hint="a grid without clipping and with scales of either sign")
    n, k = w.shape
    group = k if grid.group_size == -1 else grid.group_size
    with torch.no_grad():
        blocks = nn.functional.pad(w.float(), (0, -k % group)).reshape(n, -1, group)
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        lowest, highest = (code - grid.center for code in grid.code_range)
        if grid.symmetric:
            scale, zero = torch.where(high.abs() > low.abs(), high, low) / lowest, torch.zeros_like(low)
        else:
            low, high = low.clamp_max(0), high.clamp_min(0)
            scale = (high - low) / (highest - lowest)
            zero = lowest + torch.round(torch.where(scale > 0, -low / scale, 0))
        inverse = torch.where(scale.abs() < float(TINY), 0, 1 / scale)
        codes = torch.clamp(torch.round(blocks * inverse + zero), lowest, highest)
        rounded = ((codes - zero) * scale).reshape(n, -1)[:, :k]
    return _straight(w, rounded, None)
