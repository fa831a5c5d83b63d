"""2:4 sparsity: which two of every four weights along the input stay.

By magnitude the larger |w|; by Wanda (arXiv 2306.11695) the larger |w_k| ‖x_k‖₂, weighed by what the weight reads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rqc.runtime.errors import CheckpointError, SchemeError

__all__ = ["two_of_four"]

_GROUP = 4
_KEPT = 2


def two_of_four(w: NDArray[np.float64], norms: NDArray[np.float64] | None = None) -> NDArray[np.bool_]:
    """The mask [N, K] of a weight [N, K], true where it stays: two of four neighbours of a row, the first of equals.

    norms: ‖x_k‖₂ of the inputs [K], in any unit; None for magnitude. Where K is not a multiple of four, the last group
    counts as filled up with zeros, which are the first to go: of three inputs two stay, of fewer all. Raises
    CheckpointError if a score is not finite, SchemeError for norms of another width.
    """
    rows, width = w.shape
    scores = np.abs(w)
    if norms is not None:
        if norms.shape != (width,):
            raise SchemeError(f"norms {list(norms.shape)} of a weight {list(w.shape)}", hint="one for each input")
        scores = scores * norms
    if not np.isfinite(scores).all():
        raise CheckpointError("a weight or what it reads is not finite (NaN or infinity)", hint="repair the checkpoint")
    groups = -(-width // _GROUP)
    padded = np.full((rows, groups * _GROUP), -1.0)
    padded[:, :width] = scores
    order = np.argsort(-padded.reshape(rows, groups, _GROUP), axis=2, kind="stable")
    mask = np.zeros((rows, groups, _GROUP), np.bool_)
    np.put_along_axis(mask, order[:, :, :_KEPT], True, axis=2)
    return mask.reshape(rows, -1)[:, :width]
