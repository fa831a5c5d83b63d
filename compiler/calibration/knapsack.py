"""One width for each unit, of least total error within a budget of bits: a knapsack with a choice per item, exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 1 << 15
"""Steps of the budget at most, by which costs are rounded up: 1/32768 of it is all that a choice may leave unused."""


@dataclass(frozen=True)
class Item:
    """Something of `size` weights, with the error that each width in bits causes."""

    size: int
    errors: Mapping[int, float]

    @property
    def least(self) -> int:
        """The smallest width."""
        return min(self.errors)


def choose_widths(items: Sequence[Item], bits: int) -> list[int]:
    """The width of each item: least Σ error with Σ size · width ≤ bits. Of equal sums, smaller widths for later items.

    best_i(c) = min over widths w of best_{i−1}(c − size_i (w − least_i)) + error_i(w), c in steps of the bits that all
    costs divide, or of 1/32768 of the budget where there are more steps. Raises ValueError if the least is too much.
    """
    spare = bits - sum(item.size * item.least for item in items)
    if spare < 0:
        raise ValueError(f"{bits} bits for {len(items)} items that take at least {bits - spare}")
    extra = [{width: item.size * (width - item.least) for width in sorted(item.errors)} for item in items]
    spare = min(spare, sum(max(costs.values()) for costs in extra))
    divisor = math.gcd(*(cost for costs in extra for cost in costs.values()))
    step = max(1, divisor, -(-spare // STEPS))
    best = np.zeros(spare // step + 1)
    chosen = []
    for item, costs in zip(items, extra, strict=True):
        best, picked = _with(best, {width: (-(-cost // step), item.errors[width]) for width, cost in costs.items()})
        chosen.append(picked)
    return _traced(chosen, extra, step)


def _with(best: np.ndarray, options: Mapping[int, tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(least error, width that gives it) by steps spent, with one item more; options: (steps, error) by width."""
    found, picked = np.full(len(best), np.inf), np.zeros(len(best), np.int8)
    for width, (steps, error) in options.items():
        if steps >= len(best):
            continue
        total = best[: len(best) - steps] + error
        better = total < found[steps:]
        found[steps:][better], picked[steps:][better] = total[better], width
    return found, picked


def _traced(chosen: Sequence[np.ndarray], extra: Sequence[Mapping[int, int]], step: int) -> list[int]:
    """Widths from the last item to the first, each as it was picked with what the later ones left."""
    widths: list[int] = []
    place = len(chosen[0]) - 1 if chosen else 0
    for picked, costs in zip(reversed(chosen), reversed(extra), strict=True):
        width = int(picked[place])
        widths.append(width)
        place -= -(-costs[width] // step)
    return widths[::-1]
