"""Hadamard matrices of every order that the model families need, exact in integers."""

from __future__ import annotations

import numpy as np
import pytest

from rqc.models.hadamard import _prime_power, _quadratic_character, constructible, hadamard, hartley
from rqc.runtime.errors import RotationError

PALEY_I = [12, 20, 24, 44, 60, 68, 84, 108, 140, 28, 344]  # 28 = 27 + 1 and 344 = 343 + 1: fields of prime powers
PALEY_II = [36, 52, 76, 100, 148, 924]  # 52 = 2 (25 + 1), 100 = 2 (49 + 1)
SYLVESTER = [1, 2, 4, 8, 64, 512]
WILLIAMSON = [92, 172]
PRODUCTS = [40, 56, 96, 184, 688]


@pytest.mark.parametrize("n", sorted({*PALEY_I, *PALEY_II, *SYLVESTER, *WILLIAMSON, *PRODUCTS}))
def test_rows_are_orthogonal_in_integers(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == np.int8
    assert set(np.unique(h)) <= {-1, 1}
    wide = h.astype(np.int32)
    np.testing.assert_array_equal(wide @ wide.T, n * np.eye(n, dtype=np.int32))


def test_orders_up_to_a_thousand() -> None:
    built = [n for n in range(4, 1001, 4) if constructible(n)]
    for n in built:
        h = hadamard(n).astype(np.float64)  # exact: sums below 2^53
        np.testing.assert_array_equal(h @ h.T, n * np.eye(n))
    assert len(built) >= 198  # of 250; every multiple of 4 up to 112 is among them
    assert set(range(4, 113, 4)) <= set(built)


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 7, 9, 18, 50, 86, 116])
def test_orders_without_a_construction_are_refused(n: int) -> None:
    assert not constructible(n)
    with pytest.raises(RotationError, match=str(n)):
        hadamard(n)


def test_paley_one_is_not_symmetric_and_paley_two_is() -> None:
    assert np.any(hadamard(12) != hadamard(12).T)
    assert np.any(hadamard(344) != hadamard(344).T)
    np.testing.assert_array_equal(hadamard(100), hadamard(100).T)


def test_matrices_are_shared_and_read_only() -> None:
    assert hadamard(20) is hadamard(20)
    with pytest.raises(ValueError, match="read-only"):
        hadamard(20)[0, 0] = 0
    with pytest.raises(ValueError, match="read-only"):
        hartley(5)[0, 0] = 0


@pytest.mark.parametrize("p", [3, 7, 13, 101])
def test_quadratic_character_of_a_prime_field(p: int) -> None:
    squares = {x * x % p for x in range(1, p)}
    expected = [0] + [1 if x in squares else -1 for x in range(1, p)]
    np.testing.assert_array_equal(_quadratic_character(p, 1), expected)


@pytest.mark.parametrize(("p", "e"), [(3, 2), (5, 2), (7, 2), (3, 3), (7, 3), (3, 5)])
def test_quadratic_character_of_a_prime_power_field(p: int, e: int) -> None:
    chi = _quadratic_character(p, e)
    assert (chi == 0).sum() == 1
    assert chi.sum() == 0
    # The subfield GF(p) is 0..p-1: all of it is square in even degree, and keeps its own character in odd degree.
    expected = np.ones(p - 1) if e % 2 == 0 else _quadratic_character(p, 1)[1:]
    np.testing.assert_array_equal(chi[1:p], expected)


def test_prime_powers() -> None:
    assert [_prime_power(q) for q in (2, 8, 49, 343, 461)] == [(2, 1), (2, 3), (7, 2), (7, 3), (461, 1)]
    assert [q for q in range(30) if _prime_power(q) is None] == [0, 1, 6, 10, 12, 14, 15, 18, 20, 21, 22, 24, 26, 28]


@pytest.mark.parametrize("n", [1, 2, 9, 43, 50, 1155])
def test_hartley_is_symmetric_orthogonal_and_flat(n: int) -> None:
    q = hartley(n)
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(q, q.T, atol=1e-14)
    assert np.abs(q).max() <= np.sqrt(2 / n) + 1e-14


def test_hartley_of_nothing_is_refused() -> None:
    with pytest.raises(RotationError):
        hartley(0)
