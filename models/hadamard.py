"""Hadamard matrices of most orders, by construction, and an orthogonal stand-in for the orders that have none.

A Hadamard matrix H of order n has entries +-1 and H H^T = n I; n is 1, 2 or a multiple of 4. Nothing is tabulated:

* Sylvester (1867): H_2 kron H_2 kron ...
* Paley I (1933): order q + 1, q = 3 mod 4 a prime power. Not symmetric, so the side it is multiplied on matters.
* Paley II (1933): order 2 (q + 1), q = 1 mod 4 a prime power. Symmetric.
* Kronecker products of those.
* Williamson (1944): order 4 m from four symmetric circulants, found by search; gives 92 and 172.

Matrices are cached and read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from math import gcd, isqrt

import numpy as np
import numpy.typing as npt

from rqc.runtime.errors import RotationError

SignMatrix = npt.NDArray[np.int8]

LARGEST_WILLIAMSON = 43  # the search is exponential; past this m it found nothing new within a second
LARGEST_WILLIAMSON_CLASSES = 11


def constructible(n: int) -> bool:
    """Whether `hadamard(n)` can be built: any power of two, and most multiples of 4."""
    return _recipe(n) is not None


@cache
def hadamard(n: int) -> SignMatrix:
    """A Hadamard matrix, int8 [n, n] of +-1 with H H^T = n I, the same one in every process.

    Raises RotationError if it is not `constructible`.
    """
    build = _recipe(n)
    if build is None:
        raise RotationError(f"no Hadamard matrix of order {n} can be built", hint="use blocks, or hartley")
    matrix = build().astype(np.int8)
    matrix.flags.writeable = False
    return matrix


@cache
def hartley(n: int) -> npt.NDArray[np.float64]:
    """The discrete Hartley matrix cas(2 pi i j / n) / sqrt(n), cas = cos + sin: float64 [n, n], symmetric, orthogonal.

    It exists for every n >= 1 (RotationError below). Its entries are at most sqrt(2 / n), so it spreads an outlier
    almost as evenly as a Hadamard matrix does (Hartley, 1942; Bracewell, 1983).
    """
    if n < 1:
        raise RotationError(f"a rotation of order {n} does not exist", hint="the order is a size and at least 1")
    index = np.arange(n)
    angle = np.outer(index, index) % n * (2 * np.pi / n)  # reduced first: large angles lose digits
    matrix: npt.NDArray[np.float64] = (np.cos(angle) + np.sin(angle)) / np.sqrt(n)
    matrix.flags.writeable = False
    return matrix


@cache
def _recipe(n: int) -> Callable[[], SignMatrix] | None:
    """How to build order n, or None. Cheap: nothing of size n x n is made before the recipe is called."""
    if n < 1:
        return None
    if n & (n - 1) == 0:
        return partial(_sylvester, n)
    if n % 4:
        return None
    if (n - 1) % 4 == 3 and (field := _prime_power(n - 1)):
        return partial(_paley_one, *field)
    if (n // 2 - 1) % 4 == 1 and (field := _prime_power(n // 2 - 1)):
        return partial(_paley_two, *field)
    for a in range(isqrt(n), 1, -1):
        if n % a == 0 and constructible(a) and constructible(n // a):
            return partial(_kronecker, a, n // a)
    rows = _williamson_rows(n // 4)
    return None if rows is None else partial(_williamson, rows)


def _sylvester(n: int) -> SignMatrix:
    """Order n = 2^k by doubling."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _kronecker(a: int, b: int) -> SignMatrix:
    """Order a b."""
    return np.kron(hadamard(a), hadamard(b))


# Paley: finite fields


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    exponent, rest = 0, q
    while rest % p == 0:
        exponent, rest = exponent + 1, rest // p
    return (p, exponent) if rest == 1 else None


def _powers_of_x(p: int, tail: tuple[int, ...]) -> list[int]:
    """x^0, x^1, ... in GF(p)[x] / (x^e - tail(x)), up to the last before 1 comes again.

    A polynomial is given as an integer, digit i in base p for x^i. `tail` holds the e coefficients of tail(x), lowest
    first; tail[0] is not 0, so x is a unit and the walk a cycle.
    """
    place = [p**i for i in range(len(tail))]
    start = element = [1] + [0] * (len(tail) - 1)
    powers = []
    while True:
        powers.append(sum(c * w for c, w in zip(element, place, strict=True)))
        carry = element[-1]
        element = [(c + carry * t) % p for c, t in zip([0, *element[:-1]], tail, strict=True)]
        if element == start:
            return powers


def _quadratic_character(p: int, e: int) -> SignMatrix:
    """chi over GF(q), q = p^e odd: int8 [q], 0 at zero, +1 at squares, -1 elsewhere; digits in base p name elements.

    Searches for a polynomial modulo which x runs through all q - 1 elements that are not zero. Then every one of them
    is a unit, so the ring is the field, and x generates it: the even powers of x are the squares.
    """
    for tail in product(range(p), repeat=e):
        if tail[0] and len(powers := _powers_of_x(p, tail)) == p**e - 1:
            chi = np.zeros(p**e, np.int8)
            chi[powers[0::2]] = 1
            chi[powers[1::2]] = -1
            return chi
    raise RotationError(f"no field of {p}^{e} elements: {p} is not a prime", hint="this is a fault in rqc: report it")


def _jacobsthal(p: int, e: int) -> SignMatrix:
    """chi(i - j) for i, j in GF(p^e): int8 [q, q]. Skew for q = 3 mod 4, symmetric for q = 1 mod 4."""
    place = p ** np.arange(e)
    digits = np.arange(p**e)[:, None] // place % p
    difference: npt.NDArray[np.int64] = (digits[:, None] - digits) % p @ place
    chi = _quadratic_character(p, e)
    return chi[difference]


def _paley_one(p: int, e: int) -> SignMatrix:
    """Order q + 1, q = p^e = 3 mod 4: a border of ones, negated down the first column, around chi(i - j) + I."""
    matrix = np.ones((p**e + 1, p**e + 1), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _jacobsthal(p, e) + np.eye(p**e, dtype=np.int8)
    return matrix


def _paley_two(p: int, e: int) -> SignMatrix:
    """Order 2 (q + 1), q = p^e = 1 mod 4: each entry of the bordered chi(i - j) becomes a 2 x 2 block."""
    conference = np.ones((p**e + 1, p**e + 1), np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(p, e)
    one, zero = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(conference, one) + np.kron(np.eye(p**e + 1, dtype=np.int8), zero)


# Williamson: search


def _symmetry_classes(m: int) -> list[list[list[int]]]:
    """Partitions of 1..m-1 into orbits of the group of units generated by -1 and u, for every u; few orbits first."""
    partitions = {}
    for u in (u for u in range(1, m) if gcd(u, m) == 1):
        group = {s * pow(u, k, m) % m for k in range(m) for s in (1, -1)}
        orbits = sorted({tuple(sorted({g * i % m for g in group})) for i in range(1, m)})
        partitions[tuple(orbits)] = [list(orbit) for orbit in orbits]
    return sorted(partitions.values(), key=len)


@cache
def _williamson_rows(m: int) -> SignMatrix | None:
    """First rows, int8 [4, m] of +-1, of four symmetric circulants whose squares sum to 4 m I; None if none is found.

    Only rows constant on the orbits of a group of units are tried (Williamson's own restriction), two and two: at every
    shift, the periodic autocorrelations of one pair have to be the negatives of the other pair's.
    """
    if m % 2 == 0 or m > LARGEST_WILLIAMSON:
        return None
    for orbits in _symmetry_classes(m):
        if len(orbits) > LARGEST_WILLIAMSON_CLASSES:
            return None
        rows = np.ones((2 ** len(orbits), m), np.int8)
        for k, orbit in enumerate(orbits):
            rows[:, orbit] = 1 - 2 * (np.arange(len(rows))[:, None] >> k & 1)
        found = _four_that_cancel(np.stack([(rows * np.roll(rows, o[0], 1)).sum(1) for o in orbits], 1))
        if found is not None:
            return rows[found]
    return None


def _four_that_cancel(vectors: npt.NDArray[np.int64]) -> list[int] | None:
    """Indices of four rows (repeats allowed) of `vectors` [rows, shifts] that sum to zero, or None."""
    weights = np.array([pow(3, 37 + 11 * k, 2**61) for k in range(vectors.shape[1])])
    keys = vectors @ weights  # a linear hash modulo 2^64: sums that cancel have keys that cancel
    i, j = np.triu_indices(len(vectors))
    pair = keys[i] + keys[j]
    _, first, second = np.intersect1d(pair, -pair, return_indices=True)
    for a, b in zip(first, second, strict=True):
        found = [int(i[a]), int(j[a]), int(i[b]), int(j[b])]
        if not vectors[found].sum(0).any():
            return found
    return None


def _williamson(rows: SignMatrix) -> SignMatrix:
    """Order 4 m from the four first rows [4, m]: Williamson's array of quaternions."""
    m = rows.shape[1]
    a, b, c, d = rows[:, np.subtract.outer(np.arange(m), np.arange(m)) % m]
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
