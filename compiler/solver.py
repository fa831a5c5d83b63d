"""How a site is solved: the linears that read one value get codes that suit what they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.blockwise import Site
from rqc.compiler.findings import Findings, Fit
from rqc.models.gptq import Order, gptq
from rqc.models.grid import Grid
from rqc.models.moments import error_of
from rqc.models.packing import Quantized
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.errors import CheckpointError


class Solver:
    """Solves a site at a time: linears on one grid as one weight, for a row's codes depend on that row alone.

    Codes are fitted to what the engine's linears read: where the graph rounds activations, to the rounded ones (on
    SmolLM2, w4a4 in groups of 64, rotated, that lowers the perplexity from 44.1 to 40.8). The weight itself stays the
    target: the one that would suit rounded inputs best, W C Ŝ⁻¹, follows the noise of the text (68.5).
    """

    def __init__(self, quantize: QuantizeLinears, findings: Findings) -> None:
        self.grids = quantize
        self.findings = findings

    def __call__(self, site: Site) -> None:
        by_grid: dict[Grid, list[str]] = {}
        for name in site.weights:
            by_grid.setdefault(self.grids.grid_of(name), []).append(name)
        for grid, names in by_grid.items():
            try:
                self._solve(site, grid, names)
            except CheckpointError as error:
                raise CheckpointError(f"{names[0]}: {error.message}", hint=error.hint) from error

    def _solve(self, site: Site, grid: Grid, names: Sequence[str]) -> None:
        parts = [site.weights[name].read() for name in names]
        width = parts[0].shape[1]
        order = Order.of(site.moments.rounded, width if grid.group_size == -1 else grid.block(width))
        fitted, first = gptq(np.concatenate(parts), order, grid), 0
        for name, w in zip(names, parts, strict=True):
            rows = slice(first, first + len(w))
            first = rows.stop
            energy = float(error_of(w.astype(np.float32), order.moments).sum()) or 1.0
            self.findings.codes[name] = rows_of(fitted.quantized, rows)
            self.findings.fits[name] = Fit(
                *(_share(errors[rows], energy) for errors in (fitted.errors, fitted.nearest))
            )


def _share(errors: NDArray[np.float64], energy: float) -> float:
    return float(np.sqrt(errors.sum() / energy))


def rows_of(quantized: Quantized, rows: slice) -> Quantized:
    """Some rows of a quantized weight."""
    zeros = quantized.zero_points
    return replace(
        quantized,
        codes=quantized.codes[rows],
        scales=quantized.scales[rows],
        zero_points=None if zeros is None else zeros[rows],
    )
