"""Grids of small floats: their equations against PyTorch's and ml_dtypes' casts, and what the clip search gains."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from rqc.models import float_grid
from rqc.models.float_grid import FloatGrid, FloatQuantized, quantize_floats, unit_of
from rqc.models.grid import Grid, quantize
from rqc.models.quantized import LazyQuantized
from rqc.models.small_floats import E2M1, E4M3
from rqc.models.weights import Weight
from rqc.runtime.errors import CheckpointError, SchemeError

F32 = np.ndarray[Any, np.dtype[np.float32]]
KINDS = pytest.mark.parametrize("kind", ["fp8", "nvfp4"])


def weights(n: int = 24, k: int = 152, seed: int = 0) -> F32:
    """Rows of very different size; one of zeros, one with a spike, one of a single sign, one that is tiny."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * rng.lognormal(-3, 1, (n, 1))
    w[0], w[1], w[2] = 0, np.where(np.arange(k) == 7, 50, 0.01), np.abs(w[2])
    w[3] *= 1e-6
    return w.astype(np.float32)


def blocks_of(t: F32, size: int) -> F32:
    """[N, G, size], the last block of a row filled with zeros."""
    n, k = t.shape
    return np.pad(t, ((0, 0), (0, -k % size))).reshape(n, -1, size)


def errors(w: F32, q: FloatQuantized, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (blocks_of(q.dequantize() - w, size).astype(np.float64) ** 2).sum(axis=-1)


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_fp8_is_a_cast_of_pytorchs_under_one_scale_per_row(clip: Any) -> None:
    w = weights()
    q = quantize_floats(w, FloatGrid("fp8", clip))
    assert q.scales.shape == (24, 1)
    cast = torch.from_numpy(np.clip(w / q.scales, -448, 448)).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(q.codes, cast.view(torch.uint8).numpy())
    np.testing.assert_array_equal(q.dequantize(), cast.float().numpy() * q.scales)
    for kind in (np.float16, ml_dtypes.bfloat16):  # every float type of an engine holds them
        np.testing.assert_array_equal(q.scales.astype(kind).astype(np.float32), q.scales)
    if clip == "none":
        wanted = np.maximum(np.abs(w).max(axis=1) / 448, 2.0**-17)
        ratio = q.scales[:, 0] / wanted
        assert (ratio >= 1 - 1e-6).all()
        assert (ratio < 1 + 2.0**-7).all()


def test_nvfp4_is_a_cast_under_scales_that_are_casts() -> None:
    w = weights()
    q = quantize_floats(w, FloatGrid("nvfp4"))
    unit = np.float32(np.abs(w).max()) / np.float32(448 * 6)
    assert q.unit == unit == unit_of(float(np.abs(w).max()))
    largest = np.abs(blocks_of(w, 16)).max(axis=-1)
    scales = np.maximum((largest / (6 * unit)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32), 2.0**-9)
    np.testing.assert_array_equal(q.scales, scales * unit)
    np.testing.assert_array_equal(E4M3.values(q.scale_codes()), scales)
    scaled = np.clip(blocks_of(w, 16) / q.scales[..., None], -6, 6).reshape(24, -1)[:, :152]
    np.testing.assert_array_equal(q.codes, scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_doubled_4_bit_floats_are_the_same_weight_to_the_last_bit() -> None:
    q = quantize_floats(weights(), FloatGrid("nvfp4", "mse"))
    assert q.doubled().dtype == np.int8
    half = np.repeat(q.scales / np.float32(2), 16, axis=1)[:, :152]
    np.testing.assert_array_equal(q.doubled() * half, q.dequantize())


@KINDS
def test_no_block_is_worse_for_the_search_and_the_whole_is_better(kind: Any) -> None:
    w = weights(128, 512)
    plain, searched = (quantize_floats(w, FloatGrid(kind, clip)) for clip in ("none", "mse"))
    size = plain.block_size
    before, after = errors(w, plain, size), errors(w, searched, size)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum() * (0.8 if kind == "nvfp4" else 0.95)


def test_a_search_of_all_scales_gains_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of 126 candidates hold the best scale of nearly every block."""
    w = weights(32, 512)[4:]
    found = errors(w, quantize_floats(w, FloatGrid("nvfp4", "mse")), 16).sum()
    every = [FloatQuantized(**_under(w, code)) for code in range(1, 127)]
    least = np.min([errors(w, q, 16) for q in every], axis=0).sum()
    assert least <= found <= least * 1.01


def _under(w: F32, code: int) -> dict[str, Any]:
    """The parts of w under one scale for all."""
    unit = unit_of(float(np.abs(w).max()))
    scales = np.full((len(w), w.shape[1] // 16), E4M3.levels[code] * np.float32(unit), np.float32)
    codes = E2M1.codes(w / scales[0, 0])
    parts = {"codes": codes, "scales": scales, "zero_points": None, "bits": 4, "storage_bits": 4, "block_size": 16}
    return {**parts, "form": E2M1, "unit": unit}


def test_floats_beat_integers_where_a_spike_sets_the_scale() -> None:
    w = weights()[1:2]
    relative = [
        float(np.linalg.norm((q.dequantize() - w)[:, 8:]) / np.linalg.norm(w[:, 8:]))
        for q in (quantize_floats(w, FloatGrid("fp8")), quantize(w, Grid(8, -1, positive=True)))
    ]
    assert relative[0] < 0.04 < 0.9 < relative[1]


@KINDS
def test_zeros_have_scales_above_zero(kind: Any) -> None:
    q = quantize_floats(np.zeros((3, 40)), FloatGrid(kind, "mse"))
    assert not q.dequantize().any()
    assert (q.scales > 0).all()
    assert (q.scales.astype(np.float16) > 0).all()


@KINDS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e300])
def test_what_is_not_finite_is_told(kind: Any, bad: float) -> None:
    w = weights().astype(np.float64)
    w[5, 3] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_floats(w, FloatGrid(kind))


def test_grids_that_there_are_none_of_are_refused() -> None:
    with pytest.raises(SchemeError, match="fp6"):
        FloatGrid("fp6")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="clip"):
        FloatGrid("fp8", "max")  # type: ignore[arg-type]


class Rows:
    """A checkpoint of one tensor."""

    def __init__(self, w: F32) -> None:
        self.w = w.astype(np.float64)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self.w[start:stop]


@KINDS
def test_pieces_of_a_weight_make_the_whole(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale per tensor is that of all of it, whatever is read at a time; threads change nothing."""
    w = weights(64)
    whole = quantize_floats(w, FloatGrid(kind, "mse"), threads=1)
    monkeypatch.setattr(Weight.chunks, "__defaults__", (8 * 152 * 16,))
    monkeypatch.setattr(Weight.in_one_piece, "__defaults__", (8 * 152 * 16,))
    monkeypatch.setattr(float_grid, "CHUNK", 152 * 5)
    found = LazyQuantized((Weight(Rows(w), "w", w.shape),), FloatGrid(kind, "mse")).get()
    assert isinstance(found, FloatQuantized)
    np.testing.assert_array_equal(found.codes, whole.codes)
    np.testing.assert_array_equal(found.scales, whole.scales)
    assert found.unit == whole.unit
