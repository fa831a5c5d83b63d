"""Quantized weights that are not there yet: what a grid will make of lazy weights, evaluated once when it is
written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rqc.models.algebra import Array
from rqc.models.delta import Delta, magnitude_ratio, row_norms
from rqc.models.float_grid import AnyGrid, FloatGrid, round_to
from rqc.models.grid import Quantized
from rqc.models.packing import F32
from rqc.models.weights import Weight
from rqc.models.zero_points import block_offsets, compact_inputs, merge_zero_points, with_zero_points
from rqc.runtime.errors import CheckpointError, InputError

Found = Callable[[], Quantized]
"""Reads the codes that calibration has found for a weight."""

_last: tuple[LazyQuantized, Adapted] | None = None
"""Codes, scales and zero points of one weight are three tensors, written one after the other: a memo of one slot serves
them."""


@dataclass(frozen=True)
class Update:
    """An adapter's ΔW on a quantized weight. pooled: it moves the zero points; else it runs beside the weight, and the
    weight changes only where a DoRA scales its rows."""

    delta: Delta
    pooled: bool

    def applied(self, quantized: Quantized, first_row: int) -> Adapted:
        """Rows of the weight that start at `first_row`, adapted: codes stay, and scales too unless it is a DoRA.

        A DoRA's rows are scaled by m / n, n = ‖Ŵ + ΔW‖_row: s ← s m / n leaves z and z′ as they are.
        """
        rows = len(quantized.codes)
        delta = self.delta.rows(slice(first_row, first_row + rows))
        correction = np.zeros(quantized.scales.shape, np.float32)
        factors = np.ones(rows)
        if delta.magnitude is not None:
            factors = magnitude_ratio(delta.magnitude, row_norms(quantized.dequantize() + delta.dense()))
        if self.pooled:
            zeros, correction = merge_zero_points(quantized, block_offsets(delta, quantized.block_size))
            quantized = with_zero_points(quantized, zeros)
        if delta.magnitude is not None:
            scales, correction = (
                (part * factors[:, None]).astype(np.float32) for part in (quantized.scales, correction)
            )
            quantized = replace(quantized, scales=scales)
        return Adapted(quantized, correction, factors)


@dataclass(frozen=True, eq=False)
class Adapted:
    """A quantized weight with what belongs beside it: y = x Ŵᵀ + P_g(x) correctionᵀ + (the branch's y) · factors."""

    quantized: Quantized
    correction: F32
    """[N, G], for the block sums of x; zeros where no zero point was moved."""
    factors: Array
    """[N], m / n of each row; ones where there is no DoRA."""

    @classmethod
    def plain(cls, quantized: Quantized) -> Adapted:
        """A weight that no adapter touches."""
        return cls(quantized, np.zeros(quantized.scales.shape, np.float32), np.ones(len(quantized.codes)))


@dataclass(frozen=True, eq=False)
class LazyQuantized:
    """Weights with equal input size, stacked by rows, on one grid: [N, K] codes with one scale per block of K.

    updates: what an adapter does to each part; empty where there is none. found: where each part's codes are read, if
    calibration has found some; None or empty where it is rounded to nearest.
    """

    parts: tuple[Weight, ...]
    grid: AnyGrid
    updates: tuple[Update | None, ...] = ()
    found: tuple[Found | None, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def block(self) -> int:
        """The block size in storage."""
        return self.grid.block(self.shape[1])

    @property
    def groups(self) -> int:
        """Blocks along K."""
        return -(-self.shape[1] // self.block)

    @property
    def zero_pointed(self) -> bool:
        """Whether zero points are stored: those of an asymmetric grid, or those that an update has moved."""
        return not self.grid.symmetric or any(update is not None and update.pooled for update in self.updates)

    def get(self) -> Quantized:
        """Read, fold, quantize and adapt; the last result is kept for the tensors that follow."""
        return self.adapted().quantized

    def adapted(self) -> Adapted:
        """The weight with what an update left beside it."""
        global _last
        if _last is None or _last[0] is not self:
            _last = None  # let the old one go before the new one is made
            _last = (self, self._quantize())
        return _last[1]

    def updated(self, update: Update) -> LazyQuantized:
        """This weight with an adapter's update on it. Raises InputError if it cannot be exact."""
        if update.delta.magnitude is not None and not (update.delta.magnitude > 0).all():
            row = int(np.flatnonzero(~(update.delta.magnitude > 0))[0])
            raise InputError(
                f"the DoRA magnitude of output row {row} is {update.delta.magnitude[row]:g}: scales must stay positive",
                hint="use --merge fold, which has no scales yet",
            )
        if update.pooled:
            compact_inputs(update.delta, self.block)
        return replace(self, updates=(update,))

    def stacked(self, *others: LazyQuantized) -> LazyQuantized:
        """This weight with others below it: one packed projection."""
        every = (self, *others)
        updates = tuple(update for one in every for update in (one.updates or (None,) * len(one.parts)))
        found = tuple(read for one in every for read in (one.found or (None,) * len(one.parts)))
        parts = tuple(part for one in every for part in one.parts)
        return LazyQuantized(parts, self.grid, updates if any(updates) else (), found if any(found) else ())

    def _quantize(self) -> Adapted:
        nothing = (None,) * len(self.parts)
        every = zip(self.parts, self.updates or nothing, self.found or nothing, strict=True)
        return _joined([piece for part, update, found in every for piece in _pieces(part, self.grid, update, found)])


def _pieces(part: Weight, grid: AnyGrid, update: Update | None, found: Found | None) -> list[Adapted]:
    """A part on the grid, adapted: chunk by chunk of its rows, or as it was found."""
    if found is not None:
        return [Adapted.plain(found()) if update is None else update.applied(found(), 0)]
    pieces, first = [], 0
    if isinstance(grid, FloatGrid) and grid.shares and not part.in_one_piece():
        grid = grid.fitted(_largest(part))
    for chunk in part.chunks():
        try:
            quantized = round_to(chunk, grid)
            pieces.append(Adapted.plain(quantized) if update is None else update.applied(quantized, first))
        except (CheckpointError, InputError) as error:
            raise type(error)(f"{part.name}: {error.message}", hint=error.hint) from error
        first += len(chunk)
    return pieces


def _largest(part: Weight) -> float:
    """The largest magnitude of a weight; infinite where one is beyond float32, NaN where one is none."""
    return max(float(np.abs(chunk).max(initial=0)) for chunk in part.chunks())


def _joined(pieces: list[Adapted]) -> Adapted:
    """Pieces one below the other. Where one has zero points, those without get the centre that they stand for."""
    if len(pieces) == 1:
        return pieces[0]
    found = [piece.quantized for piece in pieces]
    zeros, padding = None, None
    if any(one.zero_points is not None for one in found):
        zeros = np.concatenate([one.stored_zero_points() for one in found])
    if any(one.padding is not None for one in found):
        padding = np.concatenate([one.pad_codes() for one in found])
    joined = replace(
        found[0],
        codes=np.concatenate([one.codes for one in found]),
        scales=np.concatenate([one.scales for one in found]),
        zero_points=zeros,
        padding=padding,
    )
    return Adapted(
        joined,
        np.concatenate([piece.correction for piece in pieces]),
        np.concatenate([piece.factors for piece in pieces]),
    )


def forget() -> None:
    """Drop the memo, so that no weight outlives the write."""
    global _last
    _last = None
