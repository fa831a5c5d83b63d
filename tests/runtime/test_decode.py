"""Caches are invisible: however a sequence is cut into calls, batched or grown, the function is the same."""

from __future__ import annotations

import numpy as np


def test_both_graphs_compute_the_same(engine):
    ids = np.random.default_rng(1).integers(0, 320, 60).tolist()
    shared, concat = (engine(cache=cache).logits(ids) for cache in ("shared", "concat"))
    assert shared.shape == (60, 320)
    np.testing.assert_allclose(shared, concat, rtol=0, atol=2e-5)
