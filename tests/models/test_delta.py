"""Updates as low-rank factors: dense form, pooling, rows, DoRA; and the fold that adds one to a lazy weight."""

from __future__ import annotations

import numpy as np
import pytest

from rqc.models.delta import Delta
from rqc.models.merges import AddDelta
from rqc.models.weights import Weight
from rqc.runtime.errors import InputError

DRAW = np.random.Generator(np.random.PCG64(5))
W = DRAW.normal(size=(10, 12))
BIAS = DRAW.normal(size=10)
LORA = Delta(DRAW.normal(size=(3, 12)), DRAW.normal(size=(10, 3)), 1.5)
DORA = Delta(LORA.a, LORA.b, 1.5, 1 + DRAW.random(10))


class Held:
    """Weights in memory, read by rows (`weights.Source`)."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return {"w": W, "b": BIAS}[name][start:stop].copy()


def no_norm(name: str) -> np.ndarray:
    raise AssertionError(name)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-13 * np.abs(expected).max())


def test_an_update_is_c_b_a() -> None:
    assert LORA.rank == 3
    assert LORA.shape == (10, 12)
    assert close(LORA.dense(), 1.5 * np.einsum("or,ri->oi", LORA.b, LORA.a))
    assert close(LORA.merged(W), W + LORA.dense())


def test_dora_gives_every_row_its_magnitude() -> None:
    merged = DORA.merged(W)
    assert close(np.linalg.norm(merged, axis=1), DORA.magnitude)
    direction = W + LORA.dense()
    assert close(
        merged / np.linalg.norm(merged, axis=1)[:, None], direction / np.linalg.norm(direction, axis=1)[:, None]
    )


def test_dora_with_the_norm_as_magnitude_is_lora() -> None:
    norms = np.linalg.norm(LORA.merged(W), axis=1)
    assert close(Delta(LORA.a, LORA.b, 1.5, norms).merged(W), LORA.merged(W))


def test_dora_on_a_row_of_zeros() -> None:
    empty = np.zeros((2, 12))
    still = Delta(LORA.a, np.zeros((2, 3)), 1.0, np.array([0.0, 0.0]))
    assert not still.merged(empty).any()
    with pytest.raises(InputError, match="norm of 0 in output row 1"):
        Delta(LORA.a, np.zeros((2, 3)), 1.0, np.array([0.0, 1.0])).merged(empty)


@pytest.mark.parametrize("columns", [12, 10], ids=["whole blocks", "a partial last block"])
def test_pooled_is_the_compact_a(columns: int) -> None:
    compact = DRAW.normal(size=(3, 3))
    delta = Delta(np.repeat(compact, 4, axis=1)[:, :columns], LORA.b)
    found = delta.pooled(4)
    assert found is not None
    assert np.array_equal(found, compact)
    assert delta.pooled(2) is not None
    assert delta.pooled(8) is None
    assert delta.pooled(3) is None
    x = DRAW.normal(size=columns)
    sums = np.add.reduceat(x, [0, 4, 8])
    assert close(delta.dense() @ x, delta.b @ (compact @ sums))


def test_one_bit_off_is_not_pooled() -> None:
    a = np.repeat(DRAW.normal(size=(3, 3)), 4, axis=1)
    a[1, 5] = np.nextafter(a[1, 5], 9)
    assert Delta(a, LORA.b).pooled(4) is None
    assert LORA.pooled(0) is None


@pytest.mark.parametrize("delta", [LORA, DORA], ids=["lora", "dora"])
def test_rows_are_the_update_of_those_rows(delta: Delta) -> None:
    part = delta.rows(slice(4, 7))
    assert close(part.merged(W[4:7]), delta.merged(W)[4:7])


@pytest.mark.parametrize("shapes", [((3, 12), (10, 4)), ((3,), (10, 3)), ((12, 3), (3, 10))])
def test_factors_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="no factors of an update"):
        Delta(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_magnitudes_of_other_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"magnitudes \[9\] for B \[10, 3\]"):
        Delta(LORA.a, LORA.b, 1.0, np.ones(9))


@pytest.mark.parametrize("limit", [1, 8 * 12 * 3, 1 << 20])
@pytest.mark.parametrize("delta", [LORA, DORA], ids=["lora", "dora"])
def test_a_lazy_weight_takes_it_row_by_row(delta: Delta, limit: int) -> None:
    weight = Weight(Held(), "w", W.shape).folded(AddDelta(delta))
    assert weight.row_local
    assert close(np.concatenate(list(weight.chunks(limit))), delta.merged(W))
    assert close(weight.read(), delta.merged(W))
    assert np.array_equal(Weight(Held(), "b", BIAS.shape).folded(AddDelta(delta)).read(), BIAS)


def test_a_part_of_a_stored_weight_takes_its_own_update() -> None:
    delta = LORA.rows(slice(2, 8))
    weight = Weight(Held(), "w", (6, 12), start=4).folded(AddDelta(delta))
    assert close(np.concatenate(list(weight.chunks(8 * 12 * 4))), W[4:] + delta.dense())


def test_subtracting_takes_it_away_again() -> None:
    weight = Weight(Held(), "w", W.shape).folded(AddDelta(LORA), AddDelta(LORA, -1.0))
    assert close(weight.read(), W)
    with pytest.raises(InputError, match="DoRA"):
        AddDelta(DORA, -1.0)


def test_an_update_of_another_shape_is_refused() -> None:
    weight = Weight(Held(), "w", W.shape).folded(AddDelta(LORA.rows(slice(0, 9))))
    with pytest.raises(InputError, match=r"met a weight \[10, 12\]"):
        weight.read()
