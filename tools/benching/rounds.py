"""Rounds that interleave contenders, and what is said of them: medians, quartiles, ratios within a round.

On a shared machine the speed of the minute is the largest error, and it is common to all contenders of a round: their
order rotates from round to round, and they are compared by the ratios within rounds, never by ratios of medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Sample = dict[str, float]
Round = dict[str, Sample]
"""Contender → figure → value."""


@dataclass(frozen=True)
class Quartiles:
    """Median, lower and upper quartile of a figure over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        low, median, high = (float(value) for value in np.percentile(np.asarray(values, np.float64), (25, 50, 75)))
        return cls(median, low, high)

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a part of the median."""
        return (self.high - self.low) / self.median

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.low, "q3": self.high}


def interleaved(
    names: Sequence[str], rounds: int, measure: Callable[[str], Sample], progress: Callable[[int], None]
) -> list[Round]:
    """`rounds` rounds in which each contender is measured once; each round begins with the next one."""
    done = []
    for number in range(rounds):
        first = number % len(names)
        done.append({name: measure(name) for name in (*names[first:], *names[:first])})
        progress(number + 1)
    return done


def figure(rounds: Sequence[Round], name: str, key: str) -> Quartiles:
    """A contender's figure over the rounds."""
    return Quartiles.of([row[name][key] for row in rounds])


def ratio(rounds: Sequence[Round], name: str, peer: str, key: str) -> Quartiles:
    """A contender's figure over that of `peer`, round by round."""
    return Quartiles.of([row[name][key] / row[peer][key] for row in rounds])


def widest(rounds: Sequence[Round], keys: Sequence[str]) -> float:
    """The largest spread of any contender in any of the figures `keys`."""
    return max(figure(rounds, name, key).spread for name in rounds[0] for key in keys)


def steady(
    run: Callable[[], list[Round]], keys: Sequence[str], *, limit: float, runs: int
) -> tuple[list[Round], list[float]]:
    """Repeat a run until no spread is above `limit`, `runs` times at most.

    Returns the rounds of the steadiest run, and the widest spread of each run that was made.
    """
    best, spreads = run(), []
    spreads.append(widest(best, keys))
    while spreads[-1] > limit and len(spreads) < runs:
        again = run()
        spreads.append(widest(again, keys))
        if spreads[-1] == min(spreads):
            best = again
    return best, spreads
