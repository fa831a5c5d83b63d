"""Weight grids: bit equality with ONNX Runtime's own quantizer, rounding properties, the clip search, packing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from rqc.models import grid as grid_module
from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.packing import pack, unpack
from rqc.runtime.errors import CheckpointError, SchemeError

BITS = (2, 3, 4, 6, 8)
STORAGE = {2: 2, 3: 4, 4: 4, 6: 8, 8: 8}


def weights(n: int, k: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of very different size and offset; among them zeros, exact ties, one spike and one sign only."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * rng.choice([1e-6, 0.02, 1, 4e4], (n, 1)) + rng.choice([0, 0, 0.5, -3], (n, 1))
    special = [
        np.zeros(k),
        rng.integers(-16, 17, k) / 2,
        np.where(np.arange(k) == k // 2, -50.0, 0.01),
        np.abs(rng.standard_normal(k)) + 1,
        -np.abs(rng.standard_normal(k)) - 1,
        np.resize([1.0, -1.0], k),
    ]
    w[: len(special)] = special[:n]
    return w.astype(np.float32)


def squared_error(w: np.ndarray[Any, Any], q: Quantized, group: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sum of squared errors in float64, [N, ceil(K / group)]."""
    error = (q.dequantize().astype(np.float64) - w) ** 2
    return np.add.reduceat(error, np.arange(0, w.shape[1], group), axis=1)


def same(a: Quantized, b: Quantized) -> bool:
    zeros = a.zero_points is b.zero_points is None or np.array_equal(a.zero_points, b.zero_points)
    return zeros and np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
def test_equals_onnxruntime_quantizer(bits: int, block: int, symmetric: bool) -> None:
    """No difference at all, ties included, in codes, scales, zero points and their packed bytes.

    Two things aren't compared: the codes in the padding behind K, which ONNX Runtime leaves 0 and rqc sets to the zero
    point (kernels ignore them), and the sign of a scale that is 0.
    """
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    for seed, k in enumerate((20, 152, 256, 1024)):
        w = weights(48, k, seed)
        packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(w.T))
        q = quantize(w, Grid(bits, block, symmetric))
        np.testing.assert_array_equal(q.scales, scales)
        np.testing.assert_array_equal(q.codes, unpack(packed, bits).reshape(len(w), -1)[:, :k])
        if k % block == 0:
            np.testing.assert_array_equal(q.packed_codes(), packed)
        if not symmetric:
            np.testing.assert_array_equal(q.packed_zero_points(), zeros)


def test_rounds_halves_away_from_zero_and_puts_the_extreme_on_the_lowest_code() -> None:
    w = np.zeros((2, 16), np.float32)
    w[0, :8] = [-8, -0.5, 0.5, 1.5, 2.5, -1.5, 7, 7.5]
    w[1] = -w[0]
    q = quantize(w, Grid(4, 16))
    assert q.scales.tolist() == [[1], [-1]]
    for row in q.codes:
        # Codes are positive, so a half goes up: away from zero in code space.
        assert row[:8].tolist() == [0, 8, 9, 10, 11, 7, 15, 15]


def test_just_below_half_is_not_rounded_up() -> None:
    """0.49999997 + 0.5 is 1 in float32; C's roundf says 0."""
    w = np.zeros((1, 16), np.float32)
    w[0, 0], w[0, 1] = 15, np.nextafter(np.float32(0.5), np.float32(0))
    q = quantize(w, Grid(4, 16, symmetric=False))
    assert (q.codes[0, 0], q.codes[0, 1], q.zero_points) == (15, 0, [[0]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 64, 256, -1])
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, group: int) -> None:
    """Without clipping, but for the codes at the end of the range, which may be a whole step off."""
    w = weights(24, 152, bits)
    grid = Grid(bits, group, symmetric)
    q = quantize(w, grid)
    lowest, highest = grid.code_range
    assert q.codes.min() >= lowest
    assert q.codes.max() <= highest
    step = np.abs(np.repeat(q.scales, q.block_size, axis=1)[:, :152])
    error = np.abs(q.dequantize() - w)
    slack = 2.0**-22 * np.abs(w)
    inside = (q.codes > lowest) & (q.codes < highest)
    assert (error <= step * 0.5 + slack)[inside].all()
    assert (error <= step + slack).all()


@pytest.mark.parametrize(("bits", "codes", "zero"), [(3, (4, 11), 8), (6, (96, 159), 128)])
def test_widths_without_storage_use_the_codes_around_its_centre(bits: int, codes: tuple[int, int], zero: int) -> None:
    grid = Grid(bits, 32)
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    q = quantize(w, grid)
    assert (grid.code_range, grid.center, q.storage_bits, q.zero_points) == (codes, zero, STORAGE[bits], None)
    assert (int(q.codes.min()), int(q.codes.max())) == codes
    half = 1 << (bits - 1)
    blocks = w.reshape(64, 2, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    expected = np.clip(np.rint(blocks / (extreme / -half)), -half, half - 1) * (extreme / -half)
    np.testing.assert_allclose(q.dequantize(), expected.reshape(64, 64), rtol=1e-6)
    asymmetric = quantize(w, Grid(bits, 32, symmetric=False))
    assert asymmetric.zero_points is not None
    for values in (asymmetric.codes, asymmetric.zero_points):
        assert values.min() >= codes[0]
        assert values.max() <= codes[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [20, 152, 576, 1000])
def test_per_channel_is_blocks_of_equal_scale(k: int, symmetric: bool) -> None:
    w = weights(16, k)
    grid = Grid(4, -1, symmetric)
    q = quantize(w, grid)
    assert q.block_size == grid.block(k)
    assert q.scales.shape == (16, -(-k // q.block_size))
    assert (q.scales == q.scales[:, :1]).all()
    if symmetric:
        extreme = np.where(w.max(axis=1) > -w.min(axis=1), w.max(axis=1), w.min(axis=1))
        np.testing.assert_array_equal(q.scales[:, 0], extreme / np.float32(-8))
    else:
        assert q.zero_points is not None
        assert (q.zero_points == q.zero_points[:, :1]).all()


def test_per_channel_storage_block_wastes_least_then_is_largest() -> None:
    grid = Grid(4, -1)
    assert [grid.block(k) for k in (256, 576, 152, 20, 16, 1536, 11008)] == [256, 64, 32, 32, 16, 256, 256]
    for k in range(1, 600):
        waste = {b: -k % b for b in (16, 32, 64, 128, 256)}
        assert waste[grid.block(k)] == min(waste.values())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 128, -1])
def test_clip_search_is_never_worse_in_any_block(bits: int, symmetric: bool, group: int) -> None:
    rng = np.random.default_rng(bits)
    w = np.concatenate([weights(24, 300, bits), rng.standard_t(3, (24, 300)).astype(np.float32)])
    size = 300 if group == -1 else group
    plain = squared_error(w, quantize(w, Grid(bits, group, symmetric)), size)
    clipped = squared_error(w, quantize(w, Grid(bits, group, symmetric, "mse")), size)
    assert (clipped <= plain).all()
    assert clipped[24:].sum() < plain[24:].sum()


@pytest.mark.parametrize(("bits", "group", "worst"), [(2, 32, 1.002), (3, 128, 1.002), (4, 32, 1.006), (4, -1, 1.002)])
def test_clip_search_is_close_to_exhaustive(bits: int, group: int, worst: float) -> None:
    """Against 400 ratios down to 0.05: the early end of the search costs next to nothing."""
    w = np.random.default_rng(1).standard_t(5, (32, 512)).astype(np.float32)
    size = 512 if group == -1 else group
    half = 1 << (bits - 1)
    blocks = w.reshape(32, -1, size).astype(np.float64)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2) / -half
    best = np.full(blocks.shape[:2], np.inf)
    for ratio in np.linspace(1, 0.05, 400):
        scale = extreme * ratio
        error = (np.clip(np.rint(blocks / scale), -half, half - 1) * scale - blocks) ** 2
        best = np.minimum(best, error.sum(axis=2))
    found = squared_error(w, quantize(w, Grid(bits, group, clip="mse")), size)
    assert found.sum() <= worst * best.sum()


def test_clip_search_ends_on_any_input() -> None:
    """A spike over values that are tiny beside it, and squares that overflow float32."""
    w = np.full((3, 4096), 1e-3, np.float32)
    w[:, 7] = [1e4, 1e30, -1e-30]
    q = quantize(w, Grid(2, -1, clip="mse"))
    assert np.isfinite(q.dequantize()).all()
    assert (squared_error(w, q, 4096) <= squared_error(w, quantize(w, Grid(2, -1)), 4096)).all()


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 32), (4, -1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_depends_on_itself_alone(bits: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuted rows give permuted results; threads and the size of a work item change nothing."""
    w = weights(96, 312)
    grid = Grid(bits, group, symmetric, "mse")
    q = quantize(w, grid)
    order = np.random.default_rng(0).permutation(96)
    p = quantize(w[order], grid)
    assert np.array_equal(p.codes, q.codes[order])
    assert np.array_equal(p.scales, q.scales[order])
    assert np.array_equal(p.packed_codes(), q.packed_codes()[order])
    assert np.array_equal(p.packed_zero_points(), q.packed_zero_points()[order])
    for chunk, threads in ((1, 1), (1, 4), (2000, 3), (1 << 20, None)):
        monkeypatch.setattr(grid_module, "CHUNK", chunk)
        assert same(quantize(w, grid, threads=threads), q)


def test_clip_search_of_a_block_ends_whatever_its_neighbours_do() -> None:
    """A block with a second, deeper minimum behind a barrier: rows that search longer must not carry it across."""
    w = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    w[5] = [1, *[0.17] * 15]
    grid = Grid(2, 16, clip="mse")
    together, alone = quantize(w, grid), quantize(w[5:6], grid)
    assert alone.scales == -0.5
    assert together.scales[5] == alone.scales


def test_a_transposed_or_float64_weight_gives_the_same() -> None:
    w = weights(32, 96)
    q = quantize(w, Grid(4, 32, clip="mse"))
    assert same(quantize(np.asfortranarray(w), Grid(4, 32, clip="mse")), q)
    assert same(quantize(w.astype(np.float64), Grid(4, 32, clip="mse")), q)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_zero_and_subnormal_blocks_are_zero(bits: int, symmetric: bool, clip: Any) -> None:
    w = np.zeros((3, 40), np.float32)
    w[1, :20], w[1, 32:] = 1e-40, 2
    w[2] = -1e-44
    out = quantize(w, Grid(bits, 16, symmetric, clip)).dequantize()
    assert np.isfinite(out).all()
    assert not out[[0, 2]].any()
    assert not out[1, :32].any()
    # 2 is on the grid but for the symmetric form, whose rounding of the last block is exact too: 2 is its extreme.
    np.testing.assert_allclose(out[1, 32:], 2, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, -1e300])
def test_refuses_what_float32_does_not_hold(value: float, symmetric: bool) -> None:
    for k in (48, 600):
        w = np.ones((5, k))
        w[3, 17] = value
        for group in (16, -1):
            with pytest.raises(CheckpointError, match="not finite"):
                quantize(w, Grid(4, group, symmetric))


def test_refuses_an_asymmetric_range_beyond_float32() -> None:
    w = np.resize(np.float32([3e38, -3e38]), (1, 16))
    assert np.isfinite(quantize(w, Grid(4, 16)).dequantize()).all()
    with pytest.raises(CheckpointError):
        quantize(w, Grid(4, 16, symmetric=False))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((5, 32), "5 bits"), ((4, 512), "512"), ((4, 0), "size 0"), ((4, 24), "24"), ((4, 32, True, "l2"), "l2")],
)
def test_refuses_unknown_grids(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(SchemeError, match=word) as caught:
        Grid(*arguments)
    assert caught.value.hint


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_and_unpack_are_inverse_on_every_byte(bits: int) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = unpack(every, bits)
    assert codes.shape == (4, 64 * 8 // bits)
    assert codes.max() == (1 << bits) - 1
    np.testing.assert_array_equal(pack(codes, bits), every)


def test_pack_crosses_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 4, (3, 2064), dtype=np.uint8)
    whole = pack(codes, 2)
    monkeypatch.setattr("rqc.models.packing._CHUNK_BYTES", 1024)
    np.testing.assert_array_equal(pack(codes, 2), whole)
    np.testing.assert_array_equal(pack(codes[:, ::2], 2), pack(codes[:, ::2].copy(), 2))


def test_low_bits_come_first() -> None:
    assert pack(np.array([[1, 2, 3, 15]], np.uint8), 4).tolist() == [[0x21, 0xF3]]
    assert pack(np.array([[0, 1, 2, 3]], np.uint8), 2).tolist() == [[0b11100100]]
    assert pack(np.array([[7, 255]], np.uint8), 8).tolist() == [[7, 255]]


def test_xor_0x88_gives_signed_int4() -> None:
    """ONNX INT4 (two's complement, low nibble first) of the same weight: the bytes with both top bits flipped."""
    q = quantize(weights(8, 64), Grid(4, 32))
    signed = q.codes.astype(np.int8) - 8
    nibbles = (signed & 15).astype(np.uint8)
    expected = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    np.testing.assert_array_equal(q.packed_codes().reshape(8, -1) ^ 0x88, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_padding_is_the_zero_point(bits: int) -> None:
    """Codes behind K are the block's zero point, so they dequantize to 0; zero points of no block are the default."""
    w = weights(12, 72)
    for symmetric in (True, False):
        q = quantize(w, Grid(bits, 32, symmetric))
        codes = unpack(q.packed_codes(), bits).reshape(12, 3, 32)
        zeros = unpack(q.packed_zero_points(), bits)
        if q.zero_points is not None:
            np.testing.assert_array_equal(zeros[:, :3], q.zero_points)
        assert (zeros[:, 3:] == 1 << (bits - 1)).all()
        assert (codes[:, 2, 8:] == zeros[:, 2:3]).all()
        np.testing.assert_array_equal(codes.reshape(12, -1)[:, :72], q.codes)
        assert q.packed_zero_points().shape == (12, -(-3 * bits // 8))


def test_finer_grids_err_less() -> None:
    w = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    by_bits = [squared_error(w, quantize(w, Grid(b, 32)), 512).sum() for b in BITS]
    by_group = [squared_error(w, quantize(w, Grid(4, g)), 512).sum() for g in (-1, 256, 128, 64, 32, 16)]
    for errors in (by_bits, by_group):
        assert all(coarse > fine for coarse, fine in pairwise(errors))
