"""Moments are plain sums over tokens, and the weight that suits rounded inputs is a regression drawn to the weight."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rqc.models.moments import Moments
from rqc.models.token_grid import TokenGrid
from rqc.runtime.errors import CheckpointError

Array = NDArray[np.float64]
GRID = TokenGrid(4, False, 0.9)


def tokens(count: int, width: int = 48, seed: int = 1) -> NDArray[np.float32]:
    """Correlated, as a decoder block's are."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((width, width)) * np.exp(-np.arange(width) / 8)[:, None]
    return (np.random.default_rng(seed).standard_normal((count, width)) @ mixing).astype(np.float32)


def crossed(x: NDArray[np.float32]) -> Moments:
    moments = Moments(x.shape[1], crossed=True)
    moments.add(GRID.round(x), x)
    return moments


def test_moments_are_plain_sums_over_tokens() -> None:
    x = np.random.default_rng(0).normal(size=(3, 50, 24)).astype(np.float32)
    once, pieces = Moments(24), Moments(24)
    once.add(x)
    for part in x:
        pieces.add(part)
    flat = x.reshape(-1, 24).astype(np.float64)
    assert once.tokens == pieces.tokens == 150
    for found in (once, pieces):
        np.testing.assert_allclose(found.second, flat.T @ flat, atol=1e-4)


def test_moments_across_rounding() -> None:
    x = tokens(300).reshape(2, 150, 48)
    there = GRID.round(x)
    moments = Moments(48, crossed=True)
    for part, rounded in zip(x, there, strict=True):
        moments.add(rounded, part)
    z, r = (one.reshape(-1, 48).astype(np.float64) for one in (x, there))
    assert moments.cross is not None
    assert moments.rounding is not None
    np.testing.assert_allclose(moments.rounding, (z - r).T @ (z - r), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(moments.second, r.T @ r, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(moments.cross - moments.second, (z - r).T @ r, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("value", "said"), [(np.inf, "is not finite"), (np.nan, "is not finite"), (1e30, "beyond a")])
@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_refused(value: float, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"{said}.* on the calibration text"):
        Moments(4).add(np.asarray([[1.0, 2.0, value, 0.0]]))


@pytest.mark.parametrize("rounds", [True, False])
def test_what_a_weight_misses_is_summed_over_tokens(rounds: bool) -> None:
    x, generator = tokens(300), np.random.default_rng(5)
    w = generator.standard_normal((20, 48))
    moments = crossed(x) if rounds else Moments(48)
    there = GRID.round(x) if rounds else x
    if not rounds:
        moments.add(x)
    for v in (w + 0.05 * generator.standard_normal(w.shape), moments.suited(w), np.zeros_like(w)):
        missed = ((x.astype(np.float64) @ w.T - there.astype(np.float64) @ v.T) ** 2).sum(0)
        np.testing.assert_allclose(moments.missed(w, v), missed, rtol=1e-3, atol=1e-3)


def test_the_suited_weight_is_the_least_of_its_objective() -> None:
    x, w = tokens(400), np.random.default_rng(5).standard_normal((20, 48))
    there, moments = GRID.round(x), crossed(x)
    strength = 0.1 * np.trace(moments.second) / 48
    found = moments.suited(w)

    def objective(v: Array) -> float:
        return float(np.linalg.norm(x @ w.T - there @ v.T) ** 2 + strength * np.linalg.norm(v - w) ** 2)

    assert objective(found) < objective(w)
    for step in (0.5, 0.9, 1.1, 2):
        assert objective(found) < objective(w + step * (found - w))
    for size in (1e-3, 1e-2):
        assert objective(found) <= objective(found + size * np.random.default_rng(6).standard_normal(w.shape))


def test_on_another_text_it_is_nearer_than_the_weight_and_than_one_that_is_not_drawn_to_it() -> None:
    """On a short text; the regression alone follows its noise."""
    x, other, w = tokens(100), tokens(2000, seed=2), np.random.default_rng(5).standard_normal((20, 48))
    there, moments = GRID.round(other), crossed(x)
    left = [np.linalg.norm(other @ w.T - there @ v.T) for v in (moments.suited(w, 0.01), w, moments.suited(w, 1e-8))]
    assert left[0] < 0.95 * min(left[1:])


@pytest.mark.filterwarnings("error")
def test_sums_beyond_a_float_are_refused() -> None:
    with pytest.raises(CheckpointError, match="beyond a float"):
        Moments(4, crossed=True).add(np.ones((2, 4), np.float32), np.full((2, 4), 2e30, np.float32))


def test_without_rounding_it_is_the_weight() -> None:
    x, w = tokens(100), np.random.default_rng(5).standard_normal((20, 48))
    plain, across, empty = Moments(48), Moments(48, crossed=True), Moments(48, crossed=True)
    plain.add(x)
    across.add(x, x)
    for moments in (plain, across, empty, Moments.white(48)):
        np.testing.assert_array_equal(moments.suited(w), w)
