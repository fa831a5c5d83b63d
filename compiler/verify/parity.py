"""How close two models are on a text: divergence of their predictions, and the perplexity of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Wide = NDArray[np.float64]

_WIDE_BYTES = 64 << 20
"""Positions are compared in pieces whose float64 log-probabilities take about this much."""


@dataclass
class Perplexity:
    """exp of the mean negative log-likelihood per token, over windows without overlap, each but for its first token."""

    total: float = 0.0
    tokens: int = 0

    def add(self, log_probabilities: Wide, targets: Ids) -> None:
        """Count predictions [n, vocab] of the tokens [m], m = n, or n − 1 at the end of a window."""
        picked = log_probabilities[np.arange(len(targets)), targets]
        self.total -= float(picked.sum())
        self.tokens += len(targets)

    @property
    def value(self) -> float:
        """The perplexity; infinite where the model is certain of something else, NaN without tokens."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.total / self.tokens)) if self.tokens else float("nan")


@dataclass
class Divergence:
    """KL(reference ‖ engine) in nats, largest difference of logits, share of equal first choices: over positions."""

    kl: float = 0.0
    max_abs: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, reference: Logits, engine: Logits, expected: Wide, found: Wide) -> None:
        """Count positions: logits [n, vocab] of both and their log-probabilities."""
        self.kl += float((np.exp(expected) * (expected - found)).sum())
        self.max_abs = max(self.max_abs, float(np.abs(reference - engine).max()))
        self.agreed += int((reference.argmax(-1) == engine.argmax(-1)).sum())
        self.positions += len(reference)

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return self.kl / self.positions

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same first choice."""
        return self.agreed / self.positions


def log_softmax(logits: Logits) -> Wide:
    """log p [n, vocab] in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def cut(ids: Sequence[int], tokens: int, window: int) -> list[Ids]:
    """The first `tokens` ids in consecutive windows; a last one of one token, which predicts nothing, is left out."""
    taken = np.asarray(ids[:tokens], np.int64)
    windows = [taken[start : start + window] for start in range(0, len(taken), window)]
    return [part for part in windows if len(part) > 1]


def perplexity(windows: Iterable[Ids], logits: Callable[[Ids], Logits]) -> float:
    """Perplexity per token of a model given as its logits [n, vocab] for one window [n]."""
    sum_up = Perplexity()
    for ids in windows:
        scores = logits(ids)
        for rows in _pieces(scores):
            sum_up.add(log_softmax(scores[rows]), ids[rows.start + 1 : rows.stop + 1])
    return sum_up.value


def compare(
    windows: Iterable[Ids], reference: Callable[[Ids], Logits], engine: Callable[[Ids], Iterator[Logits]]
) -> tuple[Divergence, float, float]:
    """Divergence of the engine, whose logits come in pieces, from the reference, and the perplexities of both."""
    divergence, expected, found = Divergence(), Perplexity(), Perplexity()
    for ids in windows:
        scores, done = reference(ids), 0
        for piece in engine(ids):
            for rows in _pieces(piece):
                place = slice(done + rows.start, done + rows.stop)
                targets = ids[place.start + 1 : place.stop + 1]
                left, right = log_softmax(scores[place]), log_softmax(piece[rows])
                divergence.add(scores[place], piece[rows], left, right)
                expected.add(left, targets)
                found.add(right, targets)
            done += len(piece)
    return divergence, expected.value, found.value


def _pieces(logits: Logits) -> Iterator[slice]:
    """Row ranges whose float64 copy stays small."""
    step = max(1, _WIDE_BYTES // (8 * logits.shape[1]))
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))
