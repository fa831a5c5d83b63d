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
    """

    width: int
    tokens: int = 0
    second: Array = field(init=False)

    def __post_init__(self) -> None:
        self.second = np.zeros((self.width, self.width))

    @classmethod
    def white(cls, width: int) -> Moments:
        """The identity: of what no text is known of. Errors under it are those of the weights."""
        made = cls(width)
        np.fill_diagonal(made.second, 1)
        return made

    def add(self, x: NDArray[Any]) -> None:
        """Count tokens x [..., width]. Raises CheckpointError if one is not finite."""
        tokens = np.ascontiguousarray(x.reshape(-1, self.width), np.float32)
        if not np.isfinite(tokens).all():
            raise CheckpointError("what it reads is not finite on the calibration text", hint="repair the checkpoint")
        self.second += tokens.T @ tokens
        self.tokens += len(tokens)


def error_of(difference: NDArray[Any], moments: NDArray[Any]) -> Array:
    """Σ ((W − Ŵ) x)² of every row [N] of a difference [N, K], over the tokens of second moments [K, K]; float64."""
    rows: Array = np.einsum("nk,nk->n", difference @ moments, difference, dtype=np.float64)
    return np.maximum(rows, 0)
