"""A linear's update as low-rank factors: every adapter that rqc knows is one, exactly.

Row vectors: y += c (x Aᵀ) Bᵀ, that is ΔW = c B A with A [r, in] and B [out, r]. Pooling adapters repeat columns of A:
QA-LoRA (arXiv 2309.14717) with its compact A, QA-HiRA with block indicators, Q-BaRA (arXiv 2407.17029) with both sides
repeated. DoRA (arXiv 2402.09353) adds the magnitudes m: W' = diag(m / ‖W + ΔW‖_row) (W + ΔW).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rqc.runtime.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Delta:
    """ΔW [out, in] = scale · b a; `a` [r, in], `b` [out, r], `magnitude` [out] (DoRA's m) or None; float64.

    Raises InputError when the shapes disagree.
    """

    a: Array
    b: Array
    scale: float = 1.0
    magnitude: Array | None = None

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InputError(
                f"A {list(self.a.shape)} and B {list(self.b.shape)} are no factors of an update",
                hint="A is [rank, in] and B is [out, rank]",
            )
        if self.magnitude is not None and self.magnitude.shape != self.b.shape[:1]:
            raise InputError(
                f"DoRA magnitudes {list(self.magnitude.shape)} for B {list(self.b.shape)}",
                hint="one magnitude for each output",
            )

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that it updates."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def dense(self) -> Array:
        """scale · b a [out, in]; of a DoRA the part inside the norm."""
        product: Array = (self.scale * self.b) @ self.a
        return product

    def pooled(self, block: int) -> Array | None:
        """A's compact form [r, ceil(in / block)] if its columns are exactly constant inside every block, else None.

        The last block may be partial. With it ΔW is one offset per row and block: scale · b @ pooled.
        """
        if block < 1:
            return None
        compact = self.a[:, ::block]
        repeated = np.repeat(compact, block, axis=1)[:, : self.a.shape[1]]
        return compact.copy() if np.array_equal(repeated, self.a) else None

    def rows(self, rows: slice) -> Delta:
        """The update of these output rows alone."""
        return Delta(self.a, self.b[rows], self.scale, None if self.magnitude is None else self.magnitude[rows])

    def merged(self, w: Array) -> Array:
        """The weight [out, in] with the update in it. Raises InputError for a DoRA where W + ΔW has a row of zeros."""
        updated: Array = w + self.dense()
        if self.magnitude is None:
            return updated
        return updated * magnitude_ratio(self.magnitude, row_norms(updated))[:, None]


def composed(deltas: Sequence[Delta]) -> Delta:
    """The sum of updates as one: factors side by side, scales in B. Pooled if all are. A single one comes as it is.

    Raises InputError for a DoRA among several: its magnitudes belong to W + its own update alone.
    """
    if len(deltas) == 1:
        return deltas[0]
    if any(delta.magnitude is not None for delta in deltas):
        raise InputError("a DoRA and another update have no sum", hint="fold them one after the other")
    a = np.concatenate([delta.a for delta in deltas])
    return Delta(a, np.concatenate([delta.scale * delta.b for delta in deltas], axis=1))


def without(delta: Delta, removed: Delta | None) -> Delta:
    """delta − removed (of a DoRA, inside the norm), as factors of the ranks' sum: (W − R) + D = W + (D − R)."""
    if removed is None:
        return delta
    a = np.concatenate([delta.a, removed.a])
    b = np.concatenate([delta.b, removed.b * (-removed.scale / delta.scale)], axis=1)
    return Delta(a, b, delta.scale, delta.magnitude)


def row_norms(w: Array) -> Array:
    """‖W‖ of each row: [out, in] -> [out]."""
    norms: Array = np.sqrt(np.einsum("oi,oi->o", w, w))
    return norms


def magnitude_ratio(magnitude: Array, norms: Array) -> Array:
    """m / n [out]: what DoRA multiplies each row with; 0 where both are 0. Raises InputError where only n is."""
    empty = norms == 0
    if (empty & (magnitude != 0)).any():
        row = int(np.flatnonzero(empty & (magnitude != 0))[0])
        raise InputError(
            f"DoRA divides by a norm of 0 in output row {row}", hint="train the adapter anew, or as plain LoRA"
        )
    ratio: Array = np.divide(magnitude, norms, out=np.zeros_like(norms), where=~empty)
    return ratio
