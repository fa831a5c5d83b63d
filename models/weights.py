"""Lazy weights: what passes compose, evaluated once, layer by layer, when a weight is packed or written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rqc.models.algebra import Array, Fold, apply_folds
from rqc.runtime.errors import CheckpointError

CHUNK_BYTES = 64 << 20


class Source(Protocol):
    """Where weights are read from: a checkpoint, or a model in memory."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of the parameter of that name, float64."""


@dataclass(frozen=True, eq=False)
class Weight:
    """Rows [start, stop) of a stored tensor and the folds on top of it; float64 when read."""

    checkpoint: Source
    name: str
    shape: tuple[int, ...]
    start: int = 0
    folds: tuple[Fold, ...] = ()

    def folded(self, *folds: Fold) -> Weight:
        """The same weight with more folds on top."""
        return replace(self, folds=self.folds + folds)

    @property
    def row_local(self) -> bool:
        """Whether rows can be evaluated apart from each other."""
        return all(fold.row_local for fold in self.folds)

    def in_one_piece(self, limit: int = CHUNK_BYTES) -> bool:
        """Whether `chunks` gives it so."""
        return not self.row_local or 8 * int(np.prod(self.shape)) <= limit

    def read(self) -> Array:
        """The whole weight. A one-dimensional one is a bias or a gain: output-side folds alone touch it."""
        stored = self.checkpoint.read(self.name, self.start, self.start + self.shape[0])
        if stored.ndim == 1:
            for fold in self.folds:
                stored = fold.bias(stored)
            return stored
        return apply_folds(list(self.folds), stored, self._gain)

    def chunks(self, limit: int = CHUNK_BYTES) -> Iterator[Array]:
        """The weight by consecutive rows, at most `limit` bytes of float64 each; in one piece if a fold mixes rows."""
        if len(self.shape) == 1 or not self.row_local:
            yield self.read()
            return
        step = max(1, limit // (8 * self.shape[1]))
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            rows = self.checkpoint.read(self.name, self.start + first, self.start + last)
            yield apply_folds(list(self.folds), rows, self._gain, first)

    def float32(self) -> NDArray[np.float32]:
        """The weight cast once, assembled chunk by chunk."""
        out = np.empty(self.shape, np.float32)
        first = 0
        for chunk in self.chunks():
            with np.errstate(over="ignore"):  # told below
                out[first : first + len(chunk)] = chunk
            first += len(chunk)
        return self.finite(out)

    def finite(self, cast: NDArray[Any]) -> NDArray[Any]:
        """`cast`, the weight in a narrower type. Raises CheckpointError where a value has become infinite in it."""
        if not (np.isfinite(cast.min()) and np.isfinite(cast.max())):  # no second array of its size
            raise CheckpointError(
                f"{self.name} holds values beyond the range of {cast.dtype}",
                hint="repair the checkpoint, or choose a scheme of wider floats",
            )
        return cast

    def _gain(self, norm: str) -> Array:
        return self.checkpoint.read(norm)

    def resident_bytes(self) -> int:
        """Peak bytes that evaluating this weight takes: float64 rows, their fold's copy, and the float32 result."""
        elements = int(np.prod(self.shape))
        working = min(elements * 8, CHUNK_BYTES) if self.row_local else elements * 8
        return 3 * working + 4 * elements
