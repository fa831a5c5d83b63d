"""Quantized weights that are not there yet: what a grid will make of lazy weights, evaluated once when it is
written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.weights import Weight
from rqc.runtime.errors import CheckpointError

_last: tuple[LazyQuantized, Quantized] | None = None
"""Codes, scales and zero points of one weight are three tensors, written one after the other: a memo of one slot serves
them."""


@dataclass(frozen=True, eq=False)
class LazyQuantized:
    """Weights with equal input size, stacked by rows, on one grid: [N, K] codes with one scale per block of K."""

    parts: tuple[Weight, ...]
    grid: Grid

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

    def get(self) -> Quantized:
        """Read, fold and quantize; the last result is kept for the tensors that follow."""
        global _last
        if _last is None or _last[0] is not self:
            _last = None  # let the old one go before the new one is made
            _last = (self, self._quantize())
        return _last[1]

    def stacked(self, *others: LazyQuantized) -> LazyQuantized:
        """This weight with others below it: one packed projection."""
        return LazyQuantized(self.parts + tuple(part for other in others for part in other.parts), self.grid)

    def _quantize(self) -> Quantized:
        chunks = [_quantized(chunk, part, self.grid) for part in self.parts for chunk in part.chunks()]
        first = chunks[0]
        if len(chunks) == 1:
            return first
        zeros = [chunk.zero_points for chunk in chunks if chunk.zero_points is not None]
        return Quantized(
            np.concatenate([chunk.codes for chunk in chunks]),
            np.concatenate([chunk.scales for chunk in chunks]),
            np.concatenate(zeros) if zeros else None,
            first.bits,
            first.storage_bits,
            first.block_size,
        )


def _quantized(chunk: np.ndarray, part: Weight, grid: Grid) -> Quantized:
    try:
        return quantize(chunk, grid)
    except CheckpointError as error:
        raise CheckpointError(f"{part.name}: {error.message}", hint=error.hint) from error


def forget() -> None:
    """Drop the memo, so that no weight outlives the write."""
    global _last
    _last = None
