"""2:4 masks: two of every four stay, the best two, whatever the width."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rqc.models.sparsity import two_of_four
from rqc.runtime.errors import CheckpointError, SchemeError

W = np.random.default_rng(0).standard_normal((12, 40))
NORMS = np.random.default_rng(1).random(40) * 10


@pytest.mark.parametrize("norms", [None, NORMS], ids=["magnitude", "wanda"])
def test_the_best_two_of_four_stay(norms: np.ndarray | None) -> None:
    """Against all six pairs of each group."""
    scores = np.abs(W) * (1 if norms is None else norms)
    mask = two_of_four(W, norms)
    for row, first in itertools.product(range(len(W)), range(0, 40, 4)):
        pairs = itertools.combinations(range(first, first + 4), 2)
        best = max(pairs, key=lambda pair: scores[row, list(pair)].sum())
        assert tuple(first + np.flatnonzero(mask[row, first : first + 4])) == best


def test_magnitude_is_nearest_and_wanda_least_in_what_comes_out() -> None:
    """Of all 2:4 masks, with inputs that are not correlated."""
    by_magnitude, by_wanda = two_of_four(W), two_of_four(W, NORMS)
    assert (by_magnitude != by_wanda).any()
    lost = [[float((((W * ~mask) * scale) ** 2).sum()) for mask in (by_magnitude, by_wanda)] for scale in (1, NORMS)]
    assert lost[0][0] < lost[0][1]
    assert lost[1][1] < lost[1][0]


def test_equal_inputs_make_wanda_magnitude() -> None:
    assert (two_of_four(W, np.full(40, 3.0)) == two_of_four(W)).all()


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_last_group_that_is_not_whole_counts_as_filled_with_zeros(rest: int) -> None:
    w = W[:, : 36 + rest]
    mask = two_of_four(w)
    filled = np.concatenate([w, np.zeros((len(w), 4 - rest))], axis=1)
    assert (mask == two_of_four(filled)[:, : 36 + rest]).all()
    assert (mask[:, 36:].sum(axis=1) == min(rest, 2)).all()
    assert (two_of_four(np.zeros((3, rest))).sum(axis=1) == min(rest, 2)).all()


def test_of_equals_the_first_stay() -> None:
    assert two_of_four(np.ones((2, 8))).tolist() == [[True, True, False, False] * 2] * 2


def test_inputs_that_no_token_reaches_go_first() -> None:
    norms = np.tile([0.0, 0.0, 1.0, 1.0], 10)
    assert (two_of_four(W, norms) == (norms > 0)).all()


def test_input_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"norms \[39\]"):
        two_of_four(W, NORMS[:39])
    broken = W.copy()
    broken[2, 3] = np.inf
    with pytest.raises(CheckpointError, match="not finite"):
        two_of_four(broken)
