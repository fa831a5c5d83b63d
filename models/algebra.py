"""The algebra of folds, by parameter name: one implementation for the graph and for the torch model that is trained.

Row vectors: a linear is y = x Wᵀ + b with W [out, in]. A fold multiplies W from the input side (what x was multiplied
with) or from the output side (what y is to be multiplied with). Everything here is float64; the caller casts once, at
the end. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406), RoLoRA (arXiv 2407.08044); R4's free signs
are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rqc.models.description import EMBEDDING, FINAL_NORM, HEAD, Claim, Description
from rqc.models.families import FFN, HEADS, RESIDUAL
from rqc.models.rotation import Orthogonal, Rotation
from rqc.runtime.errors import RotationError

Array = NDArray[np.float64]
Read = Callable[[str], Array]


class Fold(Protocol):
    """Something that a weight and its bias take up."""

    @property
    def row_local(self) -> bool:
        """Whether rows of W can be folded apart from each other."""

    def weight(self, w: Array, first_row: int, read: Read) -> Array:
        """Rows of W that start at `first_row` (all of them, unless the fold is row-local), folded."""

    def bias(self, b: Array) -> Array:
        """The whole bias, folded."""


@dataclass(frozen=True, eq=False)
class ScaleIn:
    """W ← W diag(g): the gain g of the norm before the linear moves into it. g = offset + (the norm's weight)."""

    norm: str
    offset: float = 0.0
    row_local = True

    def weight(self, w: Array, first_row: int, read: Read) -> Array:
        return w * (read(self.norm) + self.offset)

    def bias(self, b: Array) -> Array:
        return b


@dataclass(frozen=True, eq=False)
class RotateIn:
    """W ← W Q: the linear reads a stream that has been rotated to x Q."""

    rotation: Orthogonal
    row_local = True

    def weight(self, w: Array, first_row: int, read: Read) -> Array:
        return self.rotation.apply(w)

    def bias(self, b: Array) -> Array:
        return b


@dataclass(frozen=True, eq=False)
class RotateOut:
    """W ← Qᵀ W, b ← b Q, on a segment of rows: what the linear writes is to come out rotated."""

    rotation: Orthogonal
    rows: slice
    row_local = False

    def weight(self, w: Array, first_row: int, read: Read) -> Array:
        out = w.copy()
        out[self.rows] = self.rotation.apply(w[self.rows].T).T
        return out

    def bias(self, b: Array) -> Array:
        out = b.copy()
        out[self.rows] = self.rotation.apply(b[self.rows])
        return out


@dataclass(frozen=True, eq=False)
class ScaleOut:
    """W ← diag(s) W, b ← s b, on a segment of rows: the free signs of R4."""

    factors: Array
    rows: slice
    row_local = True

    def weight(self, w: Array, first_row: int, read: Read) -> Array:
        full = np.ones(self.rows.stop)
        full[self.rows] = self.factors
        part = full[first_row : first_row + len(w)]
        scaled: Array = w * np.pad(part, (0, len(w) - len(part)), constant_values=1.0)[:, None]
        return scaled

    def bias(self, b: Array) -> Array:
        out = b.copy()
        out[self.rows] *= self.factors
        return out


Folds = dict[str, list[Fold]]


def norm_folds(description: Description, *, head: bool) -> Folds:
    """Move every foldable norm gain into the linears that read it; `head`: also the final norm's gain into lm_head.

    A tied head that stays tied cannot take the gain (its table is the embedding's), so the final norm keeps it.
    """
    offset = 1.0 if description.family.offset_norms else 0.0
    folds: Folds = {claim.weight: [ScaleIn(claim.norm, offset)] for claim in description.claims if claim.norm}
    if head:
        folds[HEAD] = [ScaleIn(FINAL_NORM, offset)]
    return folds


def folded_norms(description: Description, *, head: bool) -> set[str]:
    """The names of the norm weights that `norm_folds` empties (they become 1, or 0 where the gain is 1 + w)."""
    return {claim.norm for claim in description.claims if claim.norm} | ({FINAL_NORM} if head else set())


def rotation_folds(description: Description, rotation: Rotation, *, ends: bool) -> Folds:
    """The offline half of a rotation: W ← W Q where a linear reads a rotated space, W ← Qᵀ W where it writes one.

    `ends`: R1 is folded into embedding and head too (untied, or never tied); otherwise the stream is rotated online at
    its two ends. Raises RotationError when a site would change the function of this family.
    """
    check_sites(description, rotation)
    folds: Folds = {claim.weight: _linear_folds(description, rotation, claim) for claim in description.claims}
    r1 = rotation.r1(description.architecture.hidden_size)
    if r1 is not None and ends:
        folds[EMBEDDING] = [RotateIn(r1)]
        folds[HEAD] = [RotateIn(r1)]
    return {name: applied for name, applied in folds.items() if applied}


def _linear_folds(description: Description, rotation: Rotation, claim: Claim) -> list[Fold]:
    a = description.architecture
    rows = description.segments(claim)
    ffn = description.sizes(claim.expert)[FFN]
    r1, r2, r4 = rotation.r1(a.hidden_size), rotation.r2(a.head_dim, claim.layer), rotation.r4(ffn)
    folds: list[Fold] = []
    if r1 is not None and claim.linear.reads == RESIDUAL:
        folds.append(RotateIn(r1))
    if r2 is not None and claim.linear.reads == HEADS:
        folds.append(RotateIn(r2.with_repeat(a.heads)))
    if r4 is not None and claim.linear.reads == FFN:
        folds.append(RotateIn(signed(r4, rotation.r4_signs(ffn))))
    if r1 is not None and RESIDUAL in rows:
        folds.append(RotateOut(r1, rows[RESIDUAL]))
    if r2 is not None and "value" in rows:
        folds.append(RotateOut(r2.with_repeat(a.kv_heads), rows["value"]))
    if r4 is not None and "up" in rows:
        folds.append(ScaleOut(rotation.r4_signs(ffn), rows["up"]))
    return folds


def signed(rotation: Orthogonal, signs: Array) -> Orthogonal:
    """diag(signs) Q: the offline half of R4 undoes the signs that up_proj put on the hidden channels."""
    return Orthogonal(rotation.factors, rotation.repeat, signs)


def check_sites(description: Description, rotation: Rotation) -> None:
    """Raise RotationError when the family refuses a site, naming the reason, or learned matrices are not of its
    sizes."""
    for site, reason in description.family.refusals:
        if site in rotation.sites:
            rest = ",".join(sorted({"r1", "r2", "r3", "r4"} - {name for name, _ in description.family.refusals}))
            raise RotationError(
                f"{site} cannot be folded into {description.architecture.model_type}: {reason}",
                hint=f"use --rotate {rest}",
            )
    if rotation.learned is not None:
        a = description.architecture
        rotation.learned.check({"r1": (1, a.hidden_size), "r2": (a.layers, a.head_dim)})


def dimensions(description: Description) -> dict[str, int | tuple[int, ...]]:
    """The sizes over which a rotation of this model is built, per site: what its basis hash covers."""
    a = description.architecture
    return {"r1": a.hidden_size, "r2": a.head_dim, "r3": a.head_dim, "r4": description.ffn_sizes()}


def apply_folds(folds: list[Fold], w: Array, read: Read, first_row: int = 0) -> Array:
    """Apply folds in order to rows of W that start at `first_row` (all rows, unless every fold is row-local)."""
    for fold in folds:
        w = fold.weight(w, first_row, read)
    return w
