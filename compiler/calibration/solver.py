"""How a site is solved: the linears that read one value get codes that suit what they read, and what makes up for the
rest of the error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.calibration.blockwise import Site
from rqc.compiler.calibration.compensation import rank_of
from rqc.compiler.calibration.findings import Findings, Fit
from rqc.compiler.calibration.memory import STACKED
from rqc.compiler.recipe import Recipe
from rqc.models.eora import eora, spectrum
from rqc.models.factors import costs_nothing
from rqc.models.gptq import Order, better_rows, gptq
from rqc.models.grid import Grid, quantize
from rqc.models.loftq import loftq
from rqc.models.moments import Moments
from rqc.models.packing import Quantized
from rqc.models.sparsity import two_of_four
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.errors import CheckpointError

Array = NDArray[np.float64]


@dataclass(eq=False)
class Solver:
    """Solves a site at a time: linears on one grid as one weight, for a row's codes depend on that row alone.

    Codes and branches are fitted to what the engine's linears read: where the graph rounds activations, to the rounded
    ones, and, where it does so coarsely, to the weight that suits these (`Moments.suited`): both make up for it too.

    ranks: of the branch beside each weight, where they are not all the same.
    """

    recipe: Recipe
    quantize: QuantizeLinears
    findings: Findings
    ranks: Mapping[str, int] | None = None

    def __call__(self, site: Site) -> None:
        by_grid: dict[Grid, list[str]] = {}
        for name in site.weights:
            grid = self.quantize.grid_of(name)
            assert isinstance(grid, Grid)  # small floats are rounded to nearest, never fitted
            by_grid.setdefault(grid, []).append(name)
        for grid, names in by_grid.items():
            for together in _stacks(names, site):
                try:
                    self._solve({name: site.weights[name].read() for name in together}, site.moments, grid)
                except CheckpointError as error:
                    raise CheckpointError(f"{together[0]}: {error.message}", hint=error.hint) from error

    def _solve(self, weights: Mapping[str, Array], moments: Moments, grid: Grid) -> None:
        w = np.concatenate(list(weights.values()))
        ends = np.cumsum([0, *(len(part) for part in weights.values())])
        suited = moments.suited(w)
        found, nearest = self._rounded(w, suited, moments, grid)
        for name, rows in zip(weights, (slice(first, last) for first, last in pairwise(ends)), strict=True):
            codes = self._compensated(name, suited[rows], found.rows(rows), moments, grid)
            self.findings.codes[name] = codes
            self.findings.fits[name] = self._fit(name, w[rows], codes, nearest.rows(rows), moments)

    def _rounded(self, w: Array, suited: Array, moments: Moments, grid: Grid) -> tuple[Quantized, Quantized]:
        """Codes for w [N, K] (what is pruned is zero, the rest rounded to nearest or by GPTQ), and what they are
        measured by: all of w rounded to nearest."""
        keep = self._kept(w, moments)
        plain = quantize(w if keep is None else np.where(keep, w, 0), grid)
        nearest = plain if keep is None else quantize(w, grid)
        if self.recipe.method != "gptq":
            return plain, nearest
        order = Order.of(moments.second, w.shape[1] if grid.group_size == -1 else grid.block(w.shape[1]))
        found = gptq(suited, order, grid, keep)
        if moments.crossed:  # a row fitted to the suited weight may still miss more of W z than plain rounding does
            before, after = (moments.missed(w, one.dequantize()) for one in (plain, found))
            found = better_rows(plain, found, before < after)
        return found, nearest

    def _kept(self, w: Array, moments: Moments) -> NDArray[np.bool_] | None:
        """What pruning leaves of w; None where nothing is pruned."""
        if self.recipe.sparsity != "2:4":
            return None
        return two_of_four(w, np.sqrt(np.diagonal(moments.second)) if self.recipe.prune == "wanda" else None)

    def _compensated(self, name: str, w: Array, codes: Quantized, moments: Moments, grid: Grid) -> Quantized:
        """The codes, LoftQ's own, with a branch for what rounding has done; or what one of any rank would make up for,
        where ranks are yet to be chosen."""
        if self.recipe.compensate == "none":
            return codes
        difference, second = w - codes.dequantize().astype(np.float64), moments.second
        if self.recipe.compensate_budget is not None and self.ranks is None:
            energy = float(np.einsum("nk,nk->", w @ second, w))
            self.findings.spectra[name] = spectrum(difference, second) / (np.sqrt(energy) or 1.0)
            return codes
        rank = rank_of(self.recipe, w.shape, None if self.ranks is None else self.ranks[name])
        if not rank:
            return codes
        if self.recipe.compensate == "loftq":
            best = loftq(w, grid, rank)
            assert isinstance(best.quantized, Quantized)  # an engine's grid, not one of levels
            codes, delta = best.quantized, best.delta
            difference = w - codes.dequantize()
        else:
            delta = eora(difference, second, rank)
        promised = self.recipe.compensate_budget is not None  # in bits, which are those of codes
        self.findings.add_branch(name, delta, coded=promised or costs_nothing(delta, difference, second))
        return codes

    def _fit(self, name: str, w: Array, codes: Quantized, nearest: Quantized, moments: Moments) -> Fit:
        beside = self.findings.deltas.get(name)
        made = codes.dequantize() + (0 if beside is None else beside.dense().astype(np.float32))
        whole = float(moments.missed(w, np.zeros_like(w)).sum()) or 1.0
        error, least = (float(np.sqrt(moments.missed(w, one).sum() / whole)) for one in (made, nearest.dequantize()))
        return Fit(error, least, 0 if beside is None else beside.rank)


def _stacks(names: Sequence[str], site: Site) -> Iterator[list[str]]:
    """The weights of a site in turn, as many at a time as are worth one stack."""
    stack: list[str] = []
    for name in names:
        if stack and prod(site.weights[name].shape) + sum(prod(site.weights[one].shape) for one in stack) > STACKED:
            yield stack
            stack = []
        stack.append(name)
    yield stack
