"""The choice of widths is the best there is, within the budget, and the same every time."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from rqc.compiler.calibration import knapsack
from rqc.compiler.calibration.knapsack import Item, choose_widths

WIDTHS = (2, 4, 8)


def items_of(generator: np.random.Generator, count: int, sizes: tuple[int, ...]) -> list[Item]:
    """Items whose errors fall with the width, but for one in three, where they are as they come."""
    found = []
    for _ in range(count):
        errors = generator.random(3)
        errors = errors if generator.random() < 1 / 3 else np.sort(errors)[::-1]
        found.append(Item(int(generator.choice(sizes)), dict(zip(WIDTHS, map(float, errors), strict=True))))
    return found


def cost(items: list[Item], widths: tuple[int, ...] | list[int]) -> tuple[int, float]:
    pairs = list(zip(items, widths, strict=True))
    return sum(item.size * width for item, width in pairs), sum(item.errors[width] for item, width in pairs)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    items = items_of(generator, 6, (96, 160, 288))
    total = sum(item.size for item in items)
    for mean in (2.0, 2.3, 3.1, 4.4, 6.5, 8.0):
        budget = int(mean * total)
        spent, error = cost(items, choose_widths(items, budget))
        best = min(found for bits, found in (cost(items, one) for one in product(WIDTHS, repeat=6)) if bits <= budget)
        assert spent <= budget
        assert error == pytest.approx(best, abs=1e-12)


def test_coarse_steps_stay_within_the_budget_and_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that share no divisor: costs are rounded up to a part of the budget."""
    items = items_of(np.random.Generator(np.random.PCG64(1)), 12, (9973, 10007, 20011))
    budget = 3 * sum(item.size for item in items)
    exact = cost(items, choose_widths(items, budget))
    monkeypatch.setattr(knapsack, "STEPS", 256)
    spent, error = cost(items, choose_widths(items, budget))
    assert spent <= budget
    assert exact[1] <= error <= exact[1] + 0.2


def test_equal_gains_go_to_the_first() -> None:
    same = [Item(10, {2: 1.0, 4: 0.5}) for _ in range(4)]
    assert choose_widths(same, 120) == [4, 4, 2, 2]


def test_a_width_that_gains_nothing_is_not_taken() -> None:
    assert choose_widths([Item(10, {2: 0.5, 4: 0.5, 8: 0.7})], 80) == [2]


def test_a_budget_below_the_least_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        choose_widths([Item(10, {2: 0.5, 4: 0.1})], 19)


def test_nothing_to_choose() -> None:
    assert choose_widths([], 0) == []
