"""GPTQ against what it promises: on the same grid never above rounding to nearest under the same moments, and near the
optimum where that can be tried out."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from rqc.models import gptq as module
from rqc.models.gptq import Order, gptq
from rqc.models.grid import Grid, quantize
from rqc.models.moments import error_of
from rqc.runtime.errors import CheckpointError

Array = NDArray[np.float64]


def moments_of(width: int, tokens: int, seed: int = 0) -> Array:
    """Correlated inputs, some of them a hundred times as loud."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, width)) @ (rng.normal(size=(width, width)) * np.exp(rng.normal(size=width)))
    x[:, :3] *= 100
    return np.asarray(x.T @ x)


def weight(rows: int, width: int) -> Array:
    return np.random.default_rng(1).normal(size=(rows, width)) * 0.02


def order_of(moments: Array, grid: Grid) -> Order:
    width = len(moments)
    return Order.of(moments, width if grid.group_size == -1 else grid.block(width))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [16, 64, 256, -1])
def test_no_row_is_worse_than_rounding_to_nearest(bits: int, group: int, symmetric: bool) -> None:
    grid, w, moments = Grid(bits, group, symmetric, "mse"), weight(24, 200), moments_of(200, 600)
    found, nearest = gptq(w, order_of(moments, grid), grid), quantize(w, grid)
    before, after = (error_of(w - one.dequantize(), moments) for one in (nearest, found))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() <= 0.8**2 * before.sum()
    low, high = grid.code_range
    assert found.codes.min() >= low
    assert found.codes.max() <= high
    assert (found.zero_points is None) == symmetric
    assert found.scales.shape == nearest.scales.shape


def test_a_row_that_would_be_worse_stays_rounded_to_nearest() -> None:
    """Two bits and nearly white inputs: what columns pass on to a coarse scale costs some rows more than it saves."""
    draw = np.random.default_rng(4)
    x, w, grid = draw.standard_normal((400, 32)), draw.standard_normal((8, 32)), Grid(2, 16)
    moments = x.T @ x
    found, nearest = gptq(w, Order.of(moments, 16), grid), quantize(w, grid)
    before, after = (error_of(w - one.dequantize(), moments) for one in (nearest, found))
    assert (after <= before * (1 + 1e-6)).all()
    kept = (found.dequantize() == nearest.dequantize()).all(axis=1)
    assert 0 < kept.sum() < len(w), "otherwise this test shows nothing"


@pytest.mark.parametrize("group", [16, -1])
def test_columns_that_know_nothing_of_each_other_are_rounded_to_nearest(group: int) -> None:
    grid, w = Grid(4, group, clip="mse"), weight(8, 72)
    found, nearest = gptq(w, order_of(np.diag(np.arange(1.0, 73.0)), grid), grid), quantize(w, grid)
    assert np.array_equal(found.codes, nearest.codes)
    assert np.array_equal(found.scales, nearest.scales)


def test_it_comes_near_the_best_of_all_codes() -> None:
    """Every choice of 2-bit codes for 5 columns on the scales of rounding to nearest: GPTQ is greedy, not exact."""
    grid, w, moments = Grid(2, -1), weight(6, 5), moments_of(5, 50, seed=3)
    found, nearest = gptq(w, order_of(moments, grid), grid), quantize(w, grid)
    every = np.asarray(list(product(range(4), repeat=5)))
    for row in range(len(w)):
        errors = error_of(w[row] - (every - 2.0) * nearest.scales[row, 0], moments)
        mine = error_of((w - found.dequantize())[row : row + 1], moments)[0]
        assert errors.min() * (1 - 1e-5) <= mine <= errors[: len(errors)].mean()
    best = sum(error_of(w[r] - (every - 2.0) * nearest.scales[r, 0], moments).min() for r in range(len(w)))
    assert error_of(w - found.dequantize(), moments).sum() <= 0.5 * (
        best + error_of(w - nearest.dequantize(), moments).sum()
    )


def test_columns_keep_their_place_whatever_the_order_they_are_rounded_in() -> None:
    grid, moments = Grid(4, 16, clip="mse"), moments_of(70, 300)
    columns = order_of(moments, grid).columns
    assert sorted(columns) == list(range(70))
    groups = columns // 16
    assert np.array_equal(groups[np.flatnonzero(np.diff(groups, prepend=-1))], list(dict.fromkeys(groups)))
    assert groups[-1] == 4, "the group that is not whole stays the last"
    assert not np.array_equal(columns, np.arange(70))


def test_the_loudest_group_is_rounded_first_and_in_it_the_loudest_column() -> None:
    """By the means of groups: the one with the loudest column is not the loudest, and one that is not whole waits."""
    energy = np.concatenate([np.full(16, level) for level in (1.0, 5.0, 3.0, 4.0)] + [np.full(6, 9.0)])
    energy += 0.01 * np.random.default_rng(0).permutation(70)
    energy[3] = 20
    means = energy[:64].reshape(4, 16).mean(axis=1)
    groups = [*np.argsort(-means), 4]
    assert groups == [1, 3, 2, 0, 4]
    wanted = [column for g in groups for column in 16 * g + np.argsort(-energy[16 * g : 16 * g + 16])]
    assert np.array_equal(Order.of(np.diag(energy), 16).columns, wanted)


def test_a_group_is_fitted_to_what_is_left_of_it_when_its_turn_comes() -> None:
    """To W_R + (W_F − Ŵ_F) H_FR H_RR⁻¹, the best of columns R that are open beside F, which are rounded."""
    draw = np.random.default_rng(4)
    x = draw.standard_normal((300, 32)) @ (draw.standard_normal((32, 32)) * np.exp(draw.standard_normal(32)))
    w, grid, moments = draw.standard_normal((24, 32)), Grid(4, 16), x.T @ x
    order = Order.of(moments, 16)
    found, nearest = gptq(w, order, grid), quantize(w, grid)
    first, rest = order.columns[:16], np.sort(order.columns[16:])
    h = moments + module.DAMPENING * np.diagonal(moments).mean() * np.eye(32)
    passed_on = (w - found.dequantize())[:, first] @ h[np.ix_(first, rest)] @ np.linalg.inv(h[np.ix_(rest, rest)])
    fitted, early = first[0] // 16, rest[0] // 16
    wanted = quantize(w[:, rest] + passed_on, grid).scales[:, 0]
    moved = (found.dequantize() != nearest.dequantize()).any(axis=1)  # the others are kept as they were rounded
    assert moved.sum() > 20
    assert np.array_equal(found.scales[:, fitted], nearest.scales[:, fitted])
    np.testing.assert_allclose(found.scales[moved, early], wanted[moved], rtol=1e-3)
    assert np.median(np.abs(wanted / nearest.scales[:, early] - 1)) > 0.02, "otherwise this test shows nothing"


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    grid, w, moments = Grid(4, 32), weight(8, 96), moments_of(96, tokens)
    found = gptq(w, order_of(moments, grid), grid)
    assert (
        error_of(w - found.dequantize(), moments) <= error_of(w - quantize(w, grid).dequantize(), moments) + 1e-9
    ).all()


def test_an_input_that_is_never_there_is_rounded_to_nearest() -> None:
    grid, w, moments = Grid(4, -1), weight(8, 40), moments_of(40, 200)
    moments[7] = moments[:, 7] = 0
    found, nearest = gptq(w, order_of(moments, grid), grid), quantize(w, grid)
    assert np.array_equal(found.codes[:, 7], nearest.codes[:, 7])
    assert not np.array_equal(found.codes, nearest.codes)


def test_no_tokens_at_all_leave_rounding_to_nearest() -> None:
    grid, w = Grid(4, 32), weight(4, 64)
    assert np.array_equal(gptq(w, order_of(np.zeros((64, 64)), grid), grid).codes, quantize(w, grid).codes)


def test_what_is_pruned_stays_zero_and_the_rest_makes_up_for_it() -> None:
    grid, w, moments = Grid(4, 32, False, "mse"), weight(16, 64), moments_of(64, 300)
    keep = np.tile([True, False, True, False], (16, 16))
    found = gptq(w, order_of(moments, grid), grid, keep)
    assert not found.dequantize()[~keep].any()
    plain = quantize(np.where(keep, w, 0), grid).dequantize()
    assert error_of(w - found.dequantize(), moments).sum() < error_of(w - plain, moments).sum()


def test_float64_where_float32_has_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly equal columns and next to no dampening."""
    monkeypatch.setattr(module, "DAMPENING", 1e-9)
    x = np.random.default_rng(0).normal(size=(400, 1)) + 1e-4 * np.random.default_rng(1).normal(size=(400, 48))
    grid, w = Grid(4, 16), weight(8, 48)
    moments, order = x.T @ x, order_of(x.T @ x, grid)
    assert np.isfinite(gptq(w, order, grid).scales).all()
    h = (moments + 1e-9 * np.diagonal(moments).mean() * np.eye(48))[np.ix_(order.columns, order.columns)]
    wanted = 1 / np.linalg.cholesky(h[::-1, ::-1]).diagonal()[::-1]  # of U with h⁻¹ = Uᵀ U
    np.testing.assert_allclose(order.factor.diagonal(), wanted, rtol=1e-2)  # a larger dampening has another one


@pytest.mark.parametrize(("across", "share"), [(0.5, 0.01), (1.05, 0.1), (1.5, 1.0), (50.0, 100.0)])
def test_dampening_grows_until_there_is_a_factor(across: float, share: float) -> None:
    """Of moments whose least eigenvalue is 1 − across."""
    moments = np.eye(32)
    moments[0, 1] = moments[1, 0] = across
    order = Order.of(moments, 16)
    h = (moments + share * np.eye(32))[np.ix_(order.columns, order.columns)]
    np.testing.assert_allclose(order.factor.T.astype(np.float64) @ order.factor @ h, np.eye(32), atol=1e-3)


def test_moments_that_no_dampening_helps_are_refused() -> None:
    moments = np.eye(32)
    moments[0, 1] = moments[1, 0] = 1000
    with pytest.raises(CheckpointError, match="no Cholesky factor") as raised:
        Order.of(moments, 16)
    assert "more text" in raised.value.hint


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="second moments are not finite"):
        Order.of(np.full((32, 32), np.nan), 32)
