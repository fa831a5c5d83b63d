"""Second moments of what a linear reads, gathered over the tokens of a calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.runtime.errors import CheckpointError

Array = NDArray[np.float64]


@dataclass
class Moments:
    """S = Σ x xᵀ over tokens, x [width] what a linear reads, as a plain sum: every token weighs the same.

    Products of some thousand tokens are made in float32, whose error is 1e-7 of Σ |x_i| |x_j|, and added up in float64.
    rounded, cross: Ŝ = Σ x̂ x̂ᵀ and C = Σ x x̂ᵀ, x̂ what it reads once activations are rounded; kept if `rounds`.
    """

    width: int
    rounds: bool = False
    tokens: int = 0
    plain: Array = field(init=False)
    rounded: Array = field(init=False)
    cross: Array = field(init=False)

    def __post_init__(self) -> None:
        self.plain = np.zeros((self.width, self.width))
        self.rounded = np.zeros_like(self.plain) if self.rounds else self.plain
        self.cross = np.zeros_like(self.plain) if self.rounds else self.plain

    def add(self, x: NDArray[Any], rounded: NDArray[Any] | None = None) -> None:
        """Count tokens x [..., width], and what rounding makes of them. Raises CheckpointError if one is not finite."""
        there = np.ascontiguousarray(x.reshape(-1, self.width), np.float32)
        if not np.isfinite(there).all():
            raise CheckpointError("what it reads is not finite on the calibration text", hint="repair the checkpoint")
        self.plain += there.T @ there
        self.tokens += len(there)
        if self.rounds:
            assert rounded is not None
            on_grid = np.ascontiguousarray(rounded.reshape(-1, self.width), np.float32)
            self.rounded += on_grid.T @ on_grid
            self.cross += there.T @ on_grid


def error_of(difference: NDArray[Any], moments: NDArray[Any]) -> Array:
    """Σ ((W − Ŵ) x)² of every row [N] of a difference [N, K], over the tokens of second moments [K, K]; float64."""
    rows: Array = np.einsum("nk,nk->n", difference @ moments, difference, dtype=np.float64)
    return np.maximum(rows, 0)
