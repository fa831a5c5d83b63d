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
    crossed: keep C = Σ z xᵀ too, z what x was before it was rounded; C − S has the error of a product of its own.
    """

    width: int
    tokens: int = 0
    crossed: bool = False
    second: Array = field(init=False)
    cross: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.second = np.zeros((self.width, self.width))
        self.cross = np.zeros((self.width, self.width)) if self.crossed else None

    @classmethod
    def white(cls, width: int) -> Moments:
        """The identity: of what no text is known of. Errors under it are those of the weights."""
        made = cls(width)
        np.fill_diagonal(made.second, 1)
        return made

    def add(self, x: NDArray[Any], before: NDArray[Any] | None = None) -> None:
        """Count tokens x [..., width]; before: the same before they were rounded, x if None. Raises CheckpointError if
        one is not finite."""
        tokens = np.ascontiguousarray(x.reshape(-1, self.width), np.float32)
        if not np.isfinite(tokens).all():
            raise CheckpointError("what it reads is not finite on the calibration text", hint="repair the checkpoint")
        product = tokens.T @ tokens
        self.second += product
        if self.cross is not None:
            self.cross += product
            if before is not None:
                self.cross += (before.reshape(-1, self.width).astype(np.float32) - tokens).T @ tokens
        self.tokens += len(tokens)

    def suited(self, w: NDArray[Any], dampening: float = DAMPENING) -> Array:
        """What computes W z best from rounded inputs: min Σ‖W z − V x‖² + λ‖V − W‖² over V, as w [N, K]; float64.

        V = W + W (C − S) (S + λ I)⁻¹, λ the mean of S's diagonal times `dampening` (above 0): W itself where nothing is
        rounded, and in directions that x never took. A part of the asymmetric calibration of GPTAQ (arXiv 2504.02692),
        which answers for the error of all linears in front too. Raises CheckpointError for moments beyond a float.
        """
        weight: Array = np.asarray(w, np.float64)
        strength = dampening * float(np.trace(self.second)) / self.width
        if self.cross is None or not strength:
            return weight
        if not (np.isfinite(strength) and np.isfinite(self.cross).all()):
            raise CheckpointError("its second moments are not finite", hint="repair the checkpoint")
        damped = self.second + strength * np.eye(self.width)
        moved = np.linalg.solve(damped, (weight @ (self.cross - self.second)).T).T
        suited: Array = weight + moved
        return suited

    def gain(self, w: NDArray[Any], one: NDArray[Any], other: NDArray[Any]) -> Array:
        """How much less of W z V x misses for V = `one` than for `other`, Σ‖W z − V x‖² of every row [N]; all of them
        [N, K]. Worked out from what the two differ by: what no V can change is many times as large."""
        first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
        cross = self.second if self.cross is None else self.cross
        both = (first + second) @ self.second - 2 * (np.asarray(w, np.float64) @ cross)
        found: Array = np.einsum("nk,nk->n", second - first, both)
        return found


def error_of(difference: NDArray[Any], moments: NDArray[Any]) -> Array:
    """Σ ((W − Ŵ) x)² of every row [N] of a difference [N, K], over the tokens of second moments [K, K]; float64."""
    rows: Array = np.einsum("nk,nk->n", difference @ moments, difference, dtype=np.float64)
    return np.maximum(rows, 0)
