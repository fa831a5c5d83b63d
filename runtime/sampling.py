"""Choosing the next token: greedy, temperature, top-k and nucleus (top-p) sampling, without sorting a vocabulary.

Order of the filters as in transformers: temperature, then top-k, then top-p on the distribution that top-k left.
Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751): the smallest set of most likely tokens whose mass reaches p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from rqc.runtime.backends.base import FloatArray
from rqc.runtime.errors import EngineFormatError

_FIRST_NUCLEUS = 64  # candidates sorted first; nearly always enough, grown by 8 where not
_Index = npt.NDArray[np.intp]
_Float64 = npt.NDArray[np.float64]


class Sampler:
    """Draws tokens for one row. The same seed and logits give the same tokens, whatever else is in the batch."""

    def __init__(
        self, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
    ) -> None:
        """temperature 0 is greedy; top_k 0 and top_p 1 are off; seed None draws fresh entropy."""
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, logits: FloatArray) -> int:
        """The next token for logits [vocab]. Raises EngineFormatError if they are not numbers."""
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise EngineFormatError(
                "the engine computed logits that are not finite",
                hint="check its weights with `rqc inspect ENGINE --check`",
            )
        if self._temperature == 0.0:
            return best
        tokens, weights = self._candidates(logits, float(logits[best]))
        mass = np.cumsum(weights)
        index = int(np.searchsorted(mass, self._rng.random() * mass[-1], side="right"))
        drawn = min(index, len(weights) - 1)
        return drawn if tokens is None else int(tokens[drawn])

    def _candidates(self, logits: FloatArray, best: float) -> tuple[_Index | None, _Float64]:
        """Tokens that may be drawn (None: all, in order) and their unnormalised probabilities exp((l - max) / T)."""

        def weigh(picked: FloatArray) -> _Float64:
            return np.asarray(np.exp((picked.astype(np.float64) - best) / self._temperature))

        if 0 < self._top_k < len(logits):
            tokens = largest(logits, self._top_k)
            weights = weigh(logits[tokens])
            kept = _nucleus(weights, float(weights.sum()), self._top_p)
            return tokens[:kept], weights[:kept]
        if self._top_p >= 1.0:
            return None, weigh(logits)
        return _nucleus_of_all(logits, weigh, self._top_p)


def _nucleus_of_all(
    logits: FloatArray, weigh: Callable[[FloatArray], _Float64], top_p: float
) -> tuple[_Index, _Float64]:
    """The nucleus of the whole vocabulary: only as many of the largest logits are sorted as its mass needs."""
    total = float(weigh(logits).sum())
    count = min(_FIRST_NUCLEUS, len(logits))
    while True:
        tokens = largest(logits, count)
        weights = weigh(logits[tokens])
        if count == len(logits) or float(weights.sum()) >= top_p * total:
            kept = _nucleus(weights, total, top_p)
            return tokens[:kept], weights[:kept]
        count = min(count * 8, len(logits))


def _nucleus(weights: _Float64, total: float, top_p: float) -> int:
    """How many of the descending weights reach the share top_p of total; at least one."""
    reached: Any = np.searchsorted(np.cumsum(weights), top_p * total, side="left")
    return min(int(reached) + 1, len(weights))


def largest(logits: FloatArray, count: int) -> _Index:
    """Indices of the `count` largest logits, in descending order, of equal ones the lowest index first.

    The result does not depend on how a numpy build breaks ties in argpartition.
    """
    if count < len(logits):
        threshold = logits[np.argpartition(logits, len(logits) - count)[len(logits) - count]]
        tokens = np.flatnonzero(logits >= threshold)
    else:
        tokens = np.arange(len(logits))
    order = np.argsort(-logits[tokens], kind="stable")
    return tokens[order[:count]]
