"""Signed codes under positive scales: the weight of the grid's own codes, and the grid that needs no correction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.signed_codes import LEAST_SCALE, left_over, positive_scales, signed_codes

Array = np.ndarray[Any, Any]
BITS = (2, 3, 4, 6, 8)


def weights(n: int, k: int, seed: int = 0) -> Array:
    """Rows of any sign and offset; among them zeros, blocks of zeros, one sign only, one spike."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * rng.choice([1e-3, 0.02, 1, 40], (n, 1)) + rng.choice([0, 0, 0.5, -3], (n, 1))
    w[0] = 0
    w[1, : k // 2] = 0
    w[2], w[3] = np.abs(w[2]), -np.abs(w[3])
    w[4] = np.where(np.arange(k) == k // 2, -50.0, 0.01)
    return w.astype(np.float32)


def by_hand(q: Quantized) -> Array:
    """c s′ + l in float64, block by block."""
    codes, scales, left = signed_codes(q), positive_scales(q).astype(np.float64), left_over(q).astype(np.float64)
    block = np.arange(q.shape[1]) // q.block_size
    return np.asarray(codes * scales[:, block] + left[:, block])


@pytest.mark.parametrize("kind", ["signed", "positive", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "group"), [(96, 32), (152, 64), (96, 128), (152, -1), (40, 16)])
def test_a_weight_stays_what_it_is(k: int, group: int, bits: int, kind: str) -> None:
    grid = Grid(bits, group, kind != "asymmetric", "mse", kind == "positive")
    q = quantize(weights(24, k, bits), grid)
    codes, scales = signed_codes(q), positive_scales(q)
    half = 1 << (grid.storage_bits - 1)
    assert codes.dtype == np.int8
    assert codes.shape == (24, k)
    assert (-half <= codes).all()
    assert (codes < half).all()
    assert scales.shape == q.scales.shape
    assert (scales >= LEAST_SCALE).all()
    assert np.float16(LEAST_SCALE) > 0
    # what float32 rounds: z and q times s
    np.testing.assert_allclose(by_hand(q), q.dequantize(), rtol=0, atol=4e-7 * float(np.abs(q.scales).max()) * half)
    if kind == "signed":
        assert (q.scales < 0).any()
        assert (q.scales > 0).any()
        assert left_over(q).any()
    if kind == "positive":
        assert not left_over(q).any()


@pytest.mark.parametrize("kind", ["signed", "positive", "asymmetric"])
def test_zeros_are_zeros_whatever_stands_for_their_scale(kind: str) -> None:
    q = quantize(np.zeros((3, 40), np.float32), Grid(4, 16, kind != "asymmetric", "mse", kind == "positive"))
    assert not q.scales.any()
    assert not signed_codes(q).any()
    assert not left_over(q).any()


def test_zero_points_that_were_moved_go_along() -> None:
    """A merge leaves any zero point of the storage beside any sign of scale, and whole codes in use."""
    rng = np.random.default_rng(1)
    for storage in (2, 4, 8):
        codes = rng.integers(0, 1 << storage, (8, 72), np.uint8)
        scales = (rng.standard_normal((8, 3)) * rng.choice([0, 1, 1], (8, 3))).astype(np.float32)
        zeros = rng.integers(0, 1 << storage, (8, 3), np.uint8)
        q = Quantized(codes, scales, zeros, storage, storage, 32)
        np.testing.assert_allclose(by_hand(q), q.dequantize(), rtol=0, atol=1e-7 * 4 * (1 << storage))
        whole = by_hand(q) + 0.0
        left = left_over(q)
        left[0, 1] += 1
        assert np.abs(whole[0, 32:64] - q.dequantize()[0, 32:64]).max() < 1e-3  # the check sees a wrong correction
        assert left[0, 1] != left_over(q)[0, 1]


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", BITS)
def test_positive_scales_cost_little(bits: int, group: int) -> None:
    """Scales above zero, and an error of at most 1.2 times that of signed ones; 2 bits in short blocks pay most."""
    w = np.random.default_rng(bits).standard_normal((64, 512)).astype(np.float32)
    errors = {}
    for positive in (False, True):
        for clip in ("none", "mse"):
            q = quantize(w, Grid(bits, group, True, "mse" if clip == "mse" else "none", positive))
            if positive:
                assert (q.scales > 0).all()
            error = (q.dequantize().astype(np.float64) - w) ** 2
            groups = error.reshape(64, -1, 512 if group == -1 else group).sum(-1)
            errors[positive, clip] = groups
    limit = 1.23 if (bits, group) == (2, 32) else 1.2
    assert errors[True, "mse"].sum() <= limit * errors[False, "mse"].sum()
    assert (errors[True, "mse"] <= errors[True, "none"] * (1 + 1e-5)).all()


def test_blocks_of_zeros_have_no_scale() -> None:
    w = np.zeros((4, 64), np.float32)
    w[1, 40] = -1
    q = quantize(w, Grid(4, 32, True, "mse", True))
    assert (q.scales >= 0).all()
    assert np.count_nonzero(q.scales) == 1
    np.testing.assert_array_equal(q.dequantize()[[0, 2, 3]], 0)
    assert q.dequantize()[1, 40] == -1
