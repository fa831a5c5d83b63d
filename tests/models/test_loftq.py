"""LoftQ: the invariants that hold always, the ones that only keeping the best gives, and the scale of the adapter."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rqc.models.checkpoint import Checkpoint
from rqc.models.grid import Grid, quantize
from rqc.models.loftq import LoftQ, exact_factors, loftq, truncated_svd
from rqc.models.nf4 import NormalFloat, quantize_levels
from rqc.runtime.errors import CheckpointError, SchemeError

Array = NDArray[np.float64]

GRIDS: list[Grid | NormalFloat] = [
    Grid(2, 32, False), Grid(2, 32, True, "mse"), Grid(3, 32), Grid(4, 32, False), Grid(4, -1), NormalFloat(),
    NormalFloat(2),
]  # fmt: skip
SHAPES = [(96, 160), (160, 96), (64, 100)]
RANK = 8


def matrix(shape: tuple[int, int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def power_law(n: int = 192) -> Array:
    """A spectrum that falls as 1/k: where alternating diverges on coarse grids."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((n, n)))[0] for _ in range(2))
    spectrum: Array = (left / np.arange(1, n + 1)) @ right
    return spectrum


def rounded(w: Array, grid: Grid | NormalFloat) -> Any:
    return quantize_levels(w, grid) if isinstance(grid, NormalFloat) else quantize(w, grid)


def same(left: Any, right: Any) -> bool:
    """Whether two quantized values agree to the last bit."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in vars(left)]
    return type(left) is type(right) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs
    )


def norm(w: Array) -> float:
    return float(np.linalg.norm(w))


def error(w: Array, fit: LoftQ) -> float:
    return norm(w - fit.quantized.dequantize() - fit.delta.dense()) / norm(w)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_adapter_is_the_best_of_its_rank_for_its_codes(shape: tuple[int, int], grid: Grid | NormalFloat) -> None:
    """Invariant (a): the error is the tail of the singular values of W - Q_T, so never above ‖W - Q_T‖."""
    w = matrix(shape)
    for iterations in (1, 4):
        fit = loftq(w, grid, RANK, iterations)
        values = np.linalg.svd(w - fit.quantized.dequantize(), compute_uv=False)
        assert error(w, fit) * norm(w) == pytest.approx(math.sqrt((values[RANK:] ** 2).sum()), rel=1e-10)
        assert error(w, fit) == pytest.approx(min(fit.errors), rel=1e-10)
        assert error(w, fit) < norm(w - fit.quantized.dequantize()) / norm(w)
        assert fit.delta.a.shape == (RANK, shape[1])
        assert fit.delta.b.shape == (shape[0], RANK)
        np.testing.assert_allclose(np.linalg.norm(fit.delta.a, axis=1), np.linalg.norm(fit.delta.b, axis=0), rtol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_iteration_is_better_than_rounding_alone(grid: Grid | NormalFloat) -> None:
    """Invariant (b)."""
    w = matrix((96, 160))
    fit = loftq(w, grid, RANK, 1)
    assert same(fit.quantized, rounded(w, grid))
    assert fit.residual is None
    assert fit.best == 1
    assert error(w, fit) < norm(w - rounded(w, grid).dequantize()) / norm(w)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_keeping_the_best_makes_it_monotone(grid: Grid | NormalFloat) -> None:
    """Where (c), the error falling with T, does not hold of the iterates, it does of what is returned."""
    for w in (matrix((96, 160)), power_law(96)):
        fits = [loftq(w, grid, RANK, iterations) for iterations in range(1, 7)]
        kept = [error(w, fit) for fit in fits]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(kept))
        for fit in fits:
            assert fit.errors == fits[-1].errors[: len(fit.errors)]
            assert error(w, fit) == pytest.approx(fit.errors[fit.best - 1], rel=1e-10)


def test_a_diverging_case_keeps_an_early_iterate() -> None:
    fit = loftq(power_law(), NormalFloat(2), RANK, 8)
    assert fit.errors[-1] > min(fit.errors), "otherwise this test shows nothing"
    assert fit.best < 8
    assert error(power_law(), fit) == pytest.approx(min(fit.errors), rel=1e-10)


@pytest.mark.parametrize("grid", [Grid(2, 32, True, "mse"), Grid(3, 32), Grid(4, 32, False), NormalFloat()], ids=str)
def test_the_codes_alone_get_worse(grid: Grid | NormalFloat) -> None:
    """Invariant (d): an adapter that LoftQ started must never be dropped."""
    w = matrix((96, 160))
    alone = [norm(w - loftq(w, grid, RANK, iterations).quantized.dequantize()) for iterations in (1, 5)]
    assert alone[1] > alone[0]


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 4.0, -1.5])
@pytest.mark.parametrize("iterations", [1, 4])
def test_the_scale_of_the_adapter_changes_nothing(scale: float, iterations: int) -> None:
    """Invariant (e): what is stored is B / c."""
    w = matrix((96, 160))
    fit, plain = (loftq(w, Grid(2, 32), RANK, iterations, scale=c) for c in (scale, 1.0))
    assert fit.delta.scale == scale
    assert error(w, fit) == pytest.approx(error(w, plain), rel=1e-12)
    assert same(fit.quantized, plain.quantized)


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 3.0])
def test_a_scale_that_is_not_accounted_for_costs_what_the_identity_says(scale: float) -> None:
    """‖E - c B A‖² = ‖E‖² - (2c - c²) ‖B A‖²: c = 2 gains nothing over rounding alone, c = 3 loses."""
    w = matrix((96, 160))
    fit = loftq(w, Grid(2, 32), RANK, 1, scale=scale)
    off = w - fit.quantized.dequantize()
    product = fit.delta.dense()
    uncorrected = norm(off - scale * product)
    assert uncorrected**2 == pytest.approx(norm(off) ** 2 - (2 * scale - scale**2) * norm(product) ** 2, rel=1e-10)
    corrected = norm(off - product)
    assert corrected < 0.98 * norm(off)
    if scale == 2:
        assert uncorrected == pytest.approx(norm(off), rel=1e-10)
    if scale > 2:
        assert uncorrected > norm(off)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_residual_gives_the_codes_again_to_the_last_bit(grid: Grid | NormalFloat) -> None:
    w = matrix((96, 160))
    fit = loftq(w, grid, RANK, 4)
    assert fit.best > 1
    assert fit.residual is not None
    assert fit.residual.scale == 1
    stored = [factor.astype(np.float32).astype(np.float64) for factor in (fit.residual.b, fit.residual.a)]
    assert same(rounded(w - stored[0] @ stored[1], grid), fit.quantized)
    again = loftq(w, grid, RANK, 4)
    assert same(again.quantized, fit.quantized)
    assert again.delta.a.tobytes() == fit.delta.a.tobytes()
    assert again.delta.b.tobytes() == fit.delta.b.tobytes()


def test_no_order_of_summation_changes_the_residual() -> None:
    generator = np.random.default_rng(0)
    for spread in (1.0, 1e-6, 1e4):
        b, a = (generator.standard_normal(shape) * spread for shape in ((40, 64), (64, 50)))
        b[:, ::3] *= 1e-3
        delta = exact_factors(b, a)
        assert (delta.a == delta.a.astype(np.float32)).all()
        assert (delta.b == delta.b.astype(np.float32)).all()
        dense = delta.dense()
        order = generator.permutation(64)
        assert np.array_equal(delta.b[:, order] @ delta.a[order], dense)
        assert np.array_equal(np.vstack([delta.rows(slice(i, i + 7)).dense() for i in range(0, 40, 7)]), dense)
        assert np.array_equal((delta.a.T @ delta.b.T).T, dense)
        exact = [math.fsum(delta.b[3] * delta.a[:, column]) for column in range(50)]
        assert np.array_equal(dense[3], exact)
        np.testing.assert_allclose(dense, b @ a, atol=1e-4 * spread**2)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
def test_truncated_svd_is_that_of_numpy(shape: tuple[int, int]) -> None:
    w = matrix(shape)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    for rank in (1, 7, 30):
        b, a = truncated_svd(w, rank)
        np.testing.assert_allclose(b @ a, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_directions_without_error_can_still_learn(shape: tuple[int, int]) -> None:
    """A row of A and a column of B that are both zero would stay so."""
    for w in (np.zeros(shape), matrix((shape[0], 3)) @ matrix((3, shape[1]))):
        b, a = truncated_svd(w, 8)
        np.testing.assert_allclose(b @ a, w, atol=1e-10)
        assert np.isfinite(a).all()
        assert (np.linalg.norm(a, axis=1) > 1e-3).all()
    grid = Grid(4, 32)
    on_grid = quantize(matrix((64, 64)).astype(np.float32), grid).dequantize().astype(np.float64)
    fit = loftq(on_grid, grid, 4, 3)
    assert fit.errors[0] < 1e-6
    assert (np.linalg.norm(fit.delta.a, axis=1) > 0).all()


def test_input_that_makes_no_sense_is_refused() -> None:
    w, grid = matrix((32, 48)), Grid(4, 32)
    for rank in (0, 33):
        with pytest.raises(SchemeError, match=f"rank {rank} "):
            loftq(w, grid, rank)
    with pytest.raises(SchemeError, match="0 iterations"):
        loftq(w, grid, 4, 0)
    for scale in (0.0, math.inf, math.nan):
        with pytest.raises(SchemeError, match="scale"):
            loftq(w, grid, 4, 1, scale)
    w[3, 5] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        loftq(w, grid, 4)


@pytest.mark.real
@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(2, 32, True, "mse"), Grid(2, 32, False, "mse")], ids=str)
def test_five_iterations_pay_on_real_weights(grid: Grid, smollm2: Path) -> None:
    off_grid, gains = Checkpoint.open(smollm2), []
    for layer, path in (
        (0, "self_attn.q_proj"), (4, "self_attn.k_proj"), (9, "self_attn.v_proj"), (14, "self_attn.o_proj"),
        (19, "mlp.gate_proj"), (24, "mlp.up_proj"), (29, "mlp.down_proj"),
    ):  # fmt: skip
        errors = loftq(off_grid.read(f"model.layers.{layer}.{path}.weight"), grid, 16, 5).errors
        gains.append(1 - min(errors) / errors[0])
    assert np.median(gains) >= 0.05
