"""Rotations that were learned: matrices, where those of `rqc.models.rotation` are made from a few words.

They are known by their float32 values, in which they travel: equal files give equal hashes on any host. What is folded
is the orthogonal matrix next to them, in float64: float32 alone would be off by 1e-7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rqc.runtime.errors import RotationError

Array = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]

LEARNABLE = ("r1", "r2")
"""Sites that fold into weights, so that any orthogonal matrix costs as much as another."""
FARTHEST = 1e-3
"""max |Q Qᵀ − I| up to which a matrix is taken for an orthogonal one that was rounded (float32: 1e-7)."""
_POLAR_STEPS = 3
"""Each squares the distance: 1e-3, 1e-6, 1e-12, 1e-24."""


@dataclass(frozen=True, eq=False)
class Learned:
    """The matrices of R1 [1, d, d], one for the model, and of R2 [layers, h, h], one a layer, by site, in float32.

    Row vectors, x ↦ x Q. Equal where all values are. Raises RotationError for other sites and shapes, and for a matrix
    that is not orthogonal, named.
    """

    matrices: Mapping[str, F32]

    def __post_init__(self) -> None:
        for site, stack in self.matrices.items():
            if site not in LEARNABLE:
                raise RotationError(f"a learned {site}", hint=f"{' and '.join(LEARNABLE)} can be learned")
            if stack.dtype != np.float32 or stack.ndim != 3 or stack.shape[1] != stack.shape[2] or 0 in stack.shape:
                raise RotationError(
                    f"a learned {site} of shape {list(stack.shape)}, {stack.dtype}", hint="square ones in float32"
                )
        if "r1" in self.matrices and len(self.matrices["r1"]) != 1:
            raise RotationError(f"{len(self.matrices['r1'])} matrices for r1", hint="one for the whole model")
        self._orthogonal  # noqa: B018 (raises)

    @property
    def sites(self) -> frozenset[str]:
        """What was learned."""
        return frozenset(self.matrices)

    def matrix(self, site: str, n: int, layer: int = 0) -> Array:
        """Q of a site, orthogonal, float64 [n, n]. Raises RotationError where it is of another order, or the layer has
        none."""
        stack = self._orthogonal[site]
        if stack.shape[1] != n:
            raise RotationError(f"the learned {site} has order {stack.shape[1]}, the model {n}", hint=_OTHER)
        if layer >= len(stack):
            raise RotationError(f"the learned {site} has {len(stack)} layers, the model more", hint=_OTHER)
        matrix: Array = stack[layer]
        return matrix

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise RotationError, naming the site, unless these are (matrices, order) of every site."""
        for site, stack in self.matrices.items():
            found, wanted = stack.shape[:2], sizes[site]
            if found != wanted:
                raise RotationError(
                    f"the learned {site} is {found[0]} × order {found[1]}, the model's is {wanted[0]} × {wanted[1]}",
                    hint=_OTHER,
                )

    def only(self, sites: frozenset[str]) -> Learned | None:
        """What was learned of these sites; None where that is nothing."""
        kept = {site: stack for site, stack in self.matrices.items() if site in sites}
        return self if len(kept) == len(self.matrices) else Learned(kept) if kept else None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 (hex) of each site's matrices."""
        return {
            site: hashlib.sha256(f"{site} {stack.shape}".encode() + stack.astype("<f4").tobytes()).hexdigest()
            for site, stack in sorted(self.matrices.items())
        }

    @cached_property
    def _orthogonal(self) -> dict[str, Array]:
        return {site: _orthogonalized(site, stack) for site, stack in self.matrices.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Learned) and self.hashes == other.hashes

    def __hash__(self) -> int:
        return hash(tuple(self.hashes.items()))


_OTHER = "it was learned for another model: rqc rotate MODEL_DIR learns it for this one"


def polar_step(q: Array) -> Array:
    """Q (3 I − Qᵀ Q) / 2: Newton's step to the orthogonal matrix next to Q, [..., n, n]."""
    n = q.shape[-1]
    stepped: Array = q @ (1.5 * np.eye(n) - 0.5 * np.swapaxes(q, -1, -2) @ q)
    return stepped


def distance(q: Array) -> float:
    """max |Q Qᵀ − I|; infinite where Q is not finite."""
    if not np.isfinite(q).all():
        return float("inf")
    return float(np.abs(q @ np.swapaxes(q, -1, -2) - np.eye(q.shape[-1])).max())


def _orthogonalized(site: str, stack: F32) -> Array:
    q = stack.astype(np.float64)
    for place, matrix in enumerate(q):
        if not (off := distance(matrix)) <= FARTHEST:
            of = f" of layer {place}" if len(q) > 1 else ""
            raise RotationError(
                f"the learned {site}{of} is not orthogonal: Q Qᵀ is off the identity by {off:.1e}",
                hint="the file is damaged, or no rotation: learn it again with rqc rotate",
            )
    for _ in range(_POLAR_STEPS):
        q = polar_step(q)
    q.flags.writeable = False
    return q
