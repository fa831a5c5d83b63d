"""EoRA (arXiv 2410.21271): the low-rank branch that makes up for what rounding a linear does to what it computes.

min E‖(ΔW - B A) x‖² over factors of rank r, ΔW = W - Ŵ, S = E[x xᵀ]: with the singular value decomposition
ΔW S^½ = U G V the minimum is B A = U_r G_r V_r S^-½ = U_r U_rᵀ ΔW, and what is left of the objective is Σ_{k>r} G_k².
The second form is the one that is computed. It inverts nothing, so that a text with fewer tokens than inputs does no
harm; in directions that the text never took (where S^-½ would be a pseudo-inverse, and A zero) it costs nothing and is
no further from ΔW than no branch.

Departures from the published code: S is a plain sum over tokens (there early samples decay), and both factors share the
length of U_rᵀ ΔW's rows by its root, so that they don't depend on the scale of x.

Where x is rounded to x̂ at run time, EoRA of `Moments.suited(W)` - Ŵ under E[x̂ x̂ᵀ] makes up for that too: undamped it is
the reduced-rank form min E‖W x - (Ŵ + B A) x̂‖², damped its regression is drawn to W.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.runtime.errors import CheckpointError, SchemeError

__all__ = ["eora", "ranks_by_budget", "spectrum", "tail"]

Array = NDArray[np.float64]


def eora(difference: Array, second_moment: Array, rank: int) -> Delta:
    """The branch for ΔW [N, K] under S [K, K] (any positive multiple of E[x xᵀ]); float64, deterministic.

    A branch of a lower rank is its first columns of B and rows of A. Where nothing is left to make up for, B is zero
    and A's row a unit vector (training can start there). Raises SchemeError for a rank that the linear does not have,
    CheckpointError if something is not finite.
    """
    if not second_moment.any():
        second_moment = np.eye(len(second_moment))  # nothing but zeros was read: plain truncation
    if not 1 <= rank <= min(difference.shape):
        raise SchemeError(
            f"rank {rank} for a weight {list(difference.shape)}", hint=f"use 1 to {min(difference.shape)}"
        )
    u = _directions(difference, second_moment, rank)
    a = u.T @ difference
    lengths = np.linalg.norm(a, axis=1)
    dead = lengths <= 1e-12 * (np.linalg.norm(difference) or 1.0)
    roots = np.sqrt(np.where(dead, 1.0, lengths))
    a, b = a / roots[:, None], u * roots
    a[dead], b[:, dead] = np.eye(*a.shape)[dead], 0
    return Delta(a, b)


def spectrum(difference: Array, second_moment: Array) -> Array:
    """G [min(N, K)], falling: singular values of ΔW S^½, which say what a branch of any rank leaves."""
    squares = _eigen(_gram(difference, second_moment)[0])[0][::-1]
    values: Array = np.sqrt(np.maximum(squares, 0))
    return values


def tail(values: Array, rank: int) -> float:
    """√(Σ_{k>r} G_k²): the root of the objective that the best branch of that rank leaves, rank 0 being none."""
    return float(np.linalg.norm(values[rank:]))


def ranks_by_budget(
    spectra: Mapping[str, Array], shapes: Mapping[str, tuple[int, int]], parameters: int, step: int = 1
) -> dict[str, int]:
    """Ranks of branches, by name, with at most so many factors' entries in all, that make up for the most: multiples of
    `step`, or all that a linear has.

    spectra: G of each linear *relative to* √E‖W x‖². An objective is in the squared units of its linear's output,
    which norms and gates behind it scale at will: a down_proj that writes large numbers would otherwise take all. As
    shares of what the linear computes they add up. One more rank of a linear [N, K] takes off G_k² and costs N + K; G
    falls, so the best next step, bought again and again, is the optimum up to the last few that don't fit.
    """
    ranks = dict.fromkeys(spectra, 0)

    def offer(name: str) -> tuple[float, str]:
        """What the next step takes off for each entry, negative, as a heap wants it."""
        gained = spectra[name][ranks[name] : ranks[name] + step]
        return -float(gained @ gained) / (max(1, len(gained)) * sum(shapes[name])), name

    offers = [offer(name) for name in spectra]
    heapq.heapify(offers)
    left = parameters
    while offers:
        gain, name = heapq.heappop(offers)
        taken = min(step, len(spectra[name]) - ranks[name])
        cost = taken * sum(shapes[name])
        if gain < 0 and cost <= left:
            left -= cost
            ranks[name] += taken
            heapq.heappush(offers, offer(name))
    return ranks


def _directions(difference: Array, second_moment: Array, rank: int) -> Array:
    """U_r [N, r]: the left singular vectors of ΔW S^½, orthonormal also where singular values are rounding error."""
    gram, rooted = _gram(difference, second_moment)
    leading = _eigen(gram)[1][:, : -rank - 1 : -1]
    return leading if rooted is None else np.linalg.qr(rooted @ leading)[0]


def _gram(difference: Array, second_moment: Array) -> tuple[Array, Array | None]:
    """M Mᵀ of M = ΔW S^½, whose eigenvalues are G²; Mᵀ M and M [N, K] where that is smaller."""
    if difference.shape[0] <= difference.shape[1]:
        return difference @ second_moment @ difference.T, None
    values, vectors = _eigen(second_moment)
    rooted = difference @ (vectors * np.sqrt(np.maximum(values, 0)))
    return rooted.T @ rooted, rooted


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix. Raises CheckpointError if it is not finite."""
    if not np.isfinite(matrix).all():
        raise CheckpointError(
            "an error or a second moment is not finite (NaN or infinity)", hint="repair the checkpoint"
        )
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors
