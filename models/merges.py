"""Adding an adapter's update to a weight, as a fold on a lazy weight (`rqc.models.weights.Weight.folded`)."""

from __future__ import annotations

from dataclasses import dataclass

from rqc.models.algebra import Array, Read
from rqc.models.delta import Delta
from rqc.runtime.errors import InputError


@dataclass(frozen=True, eq=False)
class AddDelta:
    """W ← W + sign · ΔW; of a DoRA W ← diag(m / ‖W + ΔW‖_row) (W + ΔW). Biases stay.

    The norm is one of whole rows, so rows can still be evaluated apart. Raises InputError for a negative DoRA: no
    weight can be taken apart into a direction and a magnitude that way.
    """

    delta: Delta
    sign: float = 1.0
    row_local = True

    def __post_init__(self) -> None:
        if self.delta.magnitude is not None and self.sign != 1.0:
            raise InputError(
                f"a DoRA update cannot be added {self.sign:g} times", hint="subtract plain low-rank updates only"
            )

    def weight(self, w: Array, first_row: int, read: Read) -> Array:
        """Rows of W that start at `first_row`, with their update."""
        delta = self.delta.rows(slice(first_row, first_row + len(w)))
        if delta.shape != w.shape:
            raise InputError(
                f"an update of rows {first_row} to {first_row + delta.shape[0]}, {delta.shape[1]} inputs, met a "
                f"weight {list(w.shape)}",
                hint="the adapter is of another model",
            )
        if self.sign != 1.0:
            delta = Delta(delta.a, delta.b, self.sign * delta.scale)
        return delta.merged(w)

    def bias(self, b: Array) -> Array:
        """The bias, as it is."""
        return b
