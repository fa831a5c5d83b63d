"""Second moments of what a linear reads, gathered over the tokens of a calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.runtime.errors import CheckpointError

Array = NDArray[np.float64]

DAMPENING = 0.1
"""What a regression on rounded inputs is drawn to the weight by, in means of their squares: a text of some thousand
tokens says little of most directions."""


@dataclass
class Moments:
    """S = Σ x xᵀ over tokens, x [width] what a linear reads, as a plain sum: every token weighs the same.

    Products of some thousand tokens are made in float32, whose error is 1e-7 of Σ |x_i| |x_j|, and added up in float64.
    crossed: keep C = Σ z xᵀ and R = Σ (z − x)(z − x)ᵀ too, z what x was before it was rounded; C − S has the error of a
    product of its own.
    """

    width: int
    tokens: int = 0
    crossed: bool = False
    second: Array = field(init=False)
    cross: Array | None = field(init=False, default=None)
    rounding: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.second = np.zeros((self.width, self.width))
        if self.crossed:
            self.cross, self.rounding = np.zeros_like(self.second), np.zeros_like(self.second)

    @classmethod
    def white(cls, width: int) -> Moments:
        """The identity: of what no text is known of. Errors under it are those of the weights."""
        made = cls(width)
        np.fill_diagonal(made.second, 1)
        return made

    def add(self, x: NDArray[Any], before: NDArray[Any] | None = None) -> None:
        """Count tokens x [..., width]; before: the same before they were rounded, x if None. Raises CheckpointError if
        one, or a sum of their squares, is not finite."""
        tokens, lost = np.ascontiguousarray(x.reshape(-1, self.width), np.float32), None
        with np.errstate(over="ignore", invalid="ignore"):
            product = tokens.T @ tokens
            self.second += product
            if self.cross is not None and self.rounding is not None:
                self.cross += product
                if before is not None:
                    lost = before.reshape(-1, self.width).astype(np.float32) - tokens
                    self.cross += lost.T @ tokens
                    self.rounding += lost.T @ lost
        self.tokens += len(tokens)
        if not all(np.isfinite(np.diagonal(one)).all() for one in (self.second, self.rounding) if one is not None):
            finite = np.isfinite(tokens).all() and (lost is None or np.isfinite(lost).all())
            raise CheckpointError(
                f"what it reads {'has squares beyond a float' if finite else 'is not finite'} on the calibration text",
                hint="repair the weights in front of it" if finite else "repair the checkpoint",
            )

    def suited(self, w: NDArray[Any], dampening: float = DAMPENING) -> Array:
        """What computes W z best from rounded inputs: min Σ‖W z − V x‖² + λ‖V − W‖² over V, as w [N, K]; float64.

        V = W + W (C − S) (S + λ I)⁻¹, λ the mean of S's diagonal times `dampening` (above 0): W itself where nothing is
        rounded, and in directions that x never took. A part of the asymmetric calibration of GPTAQ (arXiv 2504.02692),
        which answers for the error of all linears in front too.
        """
        weight: Array = np.asarray(w, np.float64)
        strength = dampening * float(np.trace(self.second)) / self.width
        if self.cross is None or not strength:
            return weight
        damped = self.second + strength * np.eye(self.width)
        moved = np.linalg.solve(damped, (weight @ (self.cross - self.second)).T).T
        suited: Array = weight + moved
        return suited

    def missed(self, w: NDArray[Any], v: NDArray[Any]) -> Array:
        """What V x misses of W z: Σ‖W z − V x‖² of every row [N], for w and v [N, K]; float64. Products are float32.

        With D = W − V that is W z − V x = D x + W (z − x).
        """
        plain, second = np.asarray(w, np.float32), self.second.astype(np.float32)
        left = plain - np.asarray(v, np.float32)
        rows: Array = error_of(left, second)
        if self.cross is None or self.rounding is None:
            return rows
        shift = (self.cross - self.second).astype(np.float32)
        mixed = np.einsum("nk,nk->n", plain @ shift, left, dtype=np.float64)
        rows = rows + 2 * mixed + error_of(plain, self.rounding.astype(np.float32))
        return np.maximum(rows, 0)


def error_of(difference: NDArray[Any], moments: NDArray[Any]) -> Array:
    """Σ ((W − Ŵ) x)² of every row [N] of a difference [N, K], over the tokens of second moments [K, K]; float64."""
    rows: Array = np.einsum("nk,nk->n", difference @ moments, difference, dtype=np.float64)
    return np.maximum(rows, 0)
