"""8-bit and 4-bit floats: the values are those of ml_dtypes and PyTorch, and so is rounding, ties and all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rqc.models.small_floats import E2M1, E4M3, SmallFloat

F32 = np.ndarray[Any, np.dtype[np.float32]]
FORMS = pytest.mark.parametrize("form", [E4M3, E2M1], ids=lambda form: form.name)


def values(form: SmallFloat) -> F32:
    """Every value, in rising order."""
    return np.unique(form.levels[np.isfinite(form.levels)])


def numbers(form: SmallFloat) -> F32:
    """Numbers of all sizes: the values, their middles (ties), the floats next to these, zeros, subnormals, giants."""
    every = values(form)
    middles = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(20000) * 10.0 ** rng.uniform(-8, 6, 20000)
    odd = [0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38]
    return np.concatenate([every, middles, *beside, drawn, odd]).astype(np.float32)


@FORMS
def test_the_values_are_those_of_ml_dtypes(form: SmallFloat) -> None:
    every = np.arange(1 << form.bits, dtype=np.uint8)
    np.testing.assert_array_equal(form.levels, every.view(form.storage).astype(np.float32))
    np.testing.assert_array_equal(form.stored(every).astype(np.float32), form.values(every))
    assert values(form).max() == form.top


@FORMS
def test_rounding_is_that_of_ml_dtypes_below_the_top(form: SmallFloat) -> None:
    x = numbers(form)
    cast = np.clip(x, -form.top, form.top).astype(form.storage)
    np.testing.assert_array_equal(form.codes(x), cast.view(np.uint8))
    np.testing.assert_array_equal(form.nearest(x), cast.astype(np.float32))


def test_rounding_is_that_of_pytorch() -> None:
    x = numbers(E4M3)
    cast = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(E4M3.codes(x), cast.view(torch.uint8).numpy())


@FORMS
def test_no_other_value_is_nearer(form: SmallFloat) -> None:
    """Against all of them; of two that are as near, the one with an even code."""
    x, every = numbers(form), values(form)
    x = x[np.abs(x) <= form.top]
    off = np.abs(x[:, None].astype(np.float64) - every)
    found = form.nearest(x)
    np.testing.assert_array_equal(np.abs(found - x.astype(np.float64)), off.min(axis=1))
    tied = (off == off.min(axis=1, keepdims=True)).sum(axis=1) > 1
    assert tied.sum() >= len(every) - 1
    assert not (form.codes(x[tied]) % 2).any()


@FORMS
def test_steps_are_the_distance_to_the_next_value(form: SmallFloat) -> None:
    every = values(form)
    positive = every[every >= 0]
    np.testing.assert_array_equal(form.steps(positive[:-1]), np.diff(positive))
    np.testing.assert_array_equal(form.steps(-positive), form.steps(positive))
