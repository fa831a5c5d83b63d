"""The grid per token: PyTorch's own fake quantization as the oracle, and what must hold of any tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rqc.models.token_grid import TINY, TokenGrid

GRIDS = [
    TokenGrid(bits, symmetric, clip)
    for bits in (4, 6, 8)
    for symmetric in (True, False)
    for clip in (1.0, 0.95, 0.9, 0.62)
]


def tokens(seed: int = 0) -> NDArray[np.float32]:
    """Tokens of very different size, shift and spread, [300, 48]."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((300, 48)) * draw.choice([1e-6, 1, 300], (300, 1)) + draw.choice([0, -2, 5], (300, 1))
    x[:40] *= draw.random((40, 48)) < 0.1  # most channels are zero
    return x.astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_grid_is_that_of_pytorch(grid: TokenGrid) -> None:
    x = tokens()
    codes, scales = grid.codes(x)
    if grid.symmetric:
        extent = np.abs(x).max(-1) * np.float32(grid.clip)
        step, zeros, lowest = extent / (2 ** (grid.bits - 1) - 1), np.zeros(300), -(2 ** (grid.bits - 1))
    else:
        low, high = (np.minimum(x.min(-1), 0) * grid.clip, np.maximum(x.max(-1), 0) * grid.clip)
        step = (high - low) / (2**grid.bits - 1)
        zeros, lowest = np.rint(-low / np.maximum(step, TINY)), 0
    np.testing.assert_allclose(scales[:, 0], np.maximum(step, TINY), rtol=1e-6)
    points = torch.from_numpy(zeros.astype(np.int32))
    steps = torch.from_numpy(scales[:, 0])
    there = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(x), steps, points, 0, lowest, lowest + 2**grid.bits - 1
    )
    off = np.abs(np.rint(there.numpy() / scales) - codes)  # it multiplies by 1 / s
    assert off.max() <= 1
    assert (off == 0).mean() > 0.999


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_lies_on_the_grid_is_read_back(grid: TokenGrid) -> None:
    x = tokens(1)
    x[-1] = 0
    codes, scales = grid.codes(x)
    back, steps = grid.read(grid.round(x))
    np.testing.assert_array_equal(back, codes)
    seen = codes.any(-1)
    np.testing.assert_allclose(steps[seen], scales[seen], rtol=1e-6)
    assert not grid.round(x)[-1].any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_code_is_out_of_bits_and_none_is_off_by_more_than_half_a_step(grid: TokenGrid) -> None:
    x = tokens(2)
    codes, scales = grid.codes(x)
    assert (np.maximum(codes.max(-1), 0) - np.minimum(codes.min(-1), 0)).max() <= 2**grid.bits - 1
    if grid.symmetric:
        assert -(2 ** (grid.bits - 1)) <= codes.min() < codes.max() <= 2 ** (grid.bits - 1) - 1
    inside = np.abs(x) <= grid.clip * np.abs(x).max(-1, keepdims=True) if grid.symmetric else np.ones(x.shape, bool)
    if grid.clip == 1 or grid.symmetric:
        # a token whose two ends round away from zero has its highest code cut off: half a step more
        off = np.abs(grid.round(x) - x) / scales
        assert off[inside].max() <= (0.5 if grid.symmetric else 1.0) + 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_and_tiny_tokens(symmetric: bool) -> None:
    grid = TokenGrid(4, symmetric)
    constants = np.asarray([[3.0] * 5, [-0.7] * 5, [1e-30] * 5, [-2e30] * 5], np.float32)
    np.testing.assert_allclose(grid.round(constants), constants, rtol=1e-6)
    tiny = np.asarray([[1e-39, -1e-42, 0.0, 3e-38]], np.float32)
    assert np.isfinite(grid.round(tiny)).all()
    assert np.abs(grid.round(tiny) - tiny).max() <= TINY
    x = tokens(3)
    np.testing.assert_array_equal(grid.codes(np.ldexp(x, 12))[0], grid.codes(x)[0])


def test_zero_points_help_tokens_that_lean_to_one_side() -> None:
    x = np.abs(tokens(4))
    errors = [float(np.square(TokenGrid(4, symmetric).round(x) - x).sum()) for symmetric in (True, False)]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_helps_normal_tokens_and_hurts_even_ones(symmetric: bool) -> None:
    draw = np.random.default_rng(5)

    def error(x: NDArray[np.float32], clip: float) -> float:
        return float(np.square(TokenGrid(4, symmetric, clip).round(x) - x).sum())

    normal, even = (x.astype(np.float32) for x in (draw.standard_normal((50, 500)), draw.uniform(-1, 1, (50, 500))))
    assert error(normal, 0.85) < 0.85 * error(normal, 1.0)
    assert error(even, 0.7) > error(even, 1.0)
