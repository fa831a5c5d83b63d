"""Rotations: the factored product against the dense one, every size in use, and the identity of a basis."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from rqc.models.hadamard import hadamard
from rqc.models.rotation import SITES, Orthogonal, Rotation
from rqc.runtime.errors import RotationError

INTERMEDIATE = [3072, 4864, 5632, 6144, 8192, 8960, 9728, 11008, 12288]
INTERMEDIATE += [13824, 14336, 17408, 18944, 25600, 27648, 28672, 29568]
HIDDEN = [576, 896, 960, 1152, 1536, 2304, 2560, 3584, 5120]
SMALL = [1, 2, 4, 9, 18, 20, 50, 64, 86, 96, 152, 268, 576, 960, 1536]
ALL = Rotation(frozenset(SITES))
BLOCKS = Rotation(frozenset(SITES), "block")


def r4(n: int, rotation: Rotation = ALL) -> Orthogonal:
    q = rotation.r4(n)
    assert q is not None
    return q


def r1(n: int, rotation: Rotation = ALL) -> Orthogonal:
    q = rotation.r1(n)
    assert q is not None
    return q


def kron(q: Orthogonal) -> np.ndarray:
    """diag(signs) (I kron F1 kron F2 ...) by definition."""
    dense = np.eye(q.repeat)
    for factor in q.factors:
        dense = np.kron(dense, factor)
    return dense if q.signs is None else q.signs[:, None] * dense


@pytest.mark.parametrize("n", INTERMEDIATE + HIDDEN)
def test_full_rotations_are_balanced_pairs_of_hadamards(n: int) -> None:
    q = r4(n)
    a, b = (len(f) for f in q.factors)
    assert (a * b, q.repeat, q.n) == (n, 1, n)
    assert a + b <= 3 * np.sqrt(n)  # a direct product would cost n per channel
    for factor in q.factors:
        order = len(factor)
        whole = np.rint(factor * np.sqrt(order)).astype(np.int64)
        np.testing.assert_allclose(factor, whole / np.sqrt(order), rtol=1e-15)
        np.testing.assert_array_equal(whole @ whole.T, order * np.eye(order, dtype=np.int64))
        assert np.abs(factor @ factor.T - np.eye(order)).max() < 1e-12


@pytest.mark.parametrize(
    ("n", "orders"),
    [(1536, [48, 32]), (576, [24, 24]), (11008, [172, 64]), (64, [8, 8]), (96, [12, 8]), (20, [20]), (152, [76, 2])],
)
def test_choice_of_factors(n: int, orders: list[int]) -> None:
    assert [len(f) for f in r4(n).factors] == orders


@pytest.mark.parametrize("n", [9, 18, 50, 86, 268])
def test_sizes_without_a_hadamard_get_a_full_rotation_too(n: int) -> None:
    dense = r1(n).dense()
    assert np.abs(dense @ dense.T - np.eye(n)).max() < 1e-12
    assert np.abs(dense).max() <= np.sqrt(2 / n) + 1e-12


@pytest.mark.parametrize(("n", "rotation"), [*((n, ALL) for n in SMALL), *((n, BLOCKS) for n in SMALL if n % 2 == 0)])
def test_the_factored_product_is_the_dense_one(n: int, rotation: Rotation) -> None:
    q = r1(n, rotation)
    x = np.random.default_rng(n).standard_normal((2, 3, n))
    dense = kron(q)
    assert np.abs(dense @ dense.T - np.eye(n)).max() < 1e-12
    np.testing.assert_allclose(q.apply(x), x @ dense, atol=1e-12)
    np.testing.assert_allclose(q.apply_inverse(x), x @ dense.T, atol=1e-12)
    np.testing.assert_allclose(q.dense(), dense, atol=1e-12)
    np.testing.assert_allclose(q.apply_inverse(q.apply(x)), x, atol=1e-12)


@pytest.mark.parametrize("n", [12, 48, 1536])
def test_direction_matters_where_a_factor_is_not_symmetric(n: int) -> None:
    q = r4(n)
    assert any(np.abs(f - f.T).max() > 0.1 for f in q.factors)
    x = np.random.default_rng(0).standard_normal(n)
    assert np.abs(q.apply(x) - q.apply_inverse(x)).max() > 0.1


def test_three_factors_none_and_one_vector() -> None:
    x = np.arange(60.0)
    three = Orthogonal(tuple(np.linalg.qr(np.random.default_rng(k).standard_normal((k, k)))[0] for k in (3, 4, 5)))
    np.testing.assert_allclose(three.apply(x), x @ kron(three), atol=1e-11)
    np.testing.assert_array_equal(Orthogonal((), 60).apply(x), x)


def test_inputs_are_computed_in_float64_and_left_alone() -> None:
    x = np.ones((4, 64), np.float32)
    y = r1(64).apply(x)
    assert y.dtype == np.float64
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("n", "repeat", "orders"),
    [(11008, 43, [16, 16]), (8192, 32, [16, 16]), (576, 9, [8, 8]), (20, 5, [2, 2]), (18, 9, [2])],
)
def test_blocks_for_any_even_size(n: int, repeat: int, orders: list[int]) -> None:
    q = r4(n, BLOCKS)
    assert (q.repeat, [len(f) for f in q.factors], q.n) == (repeat, orders, n)
    x = np.random.default_rng(1).standard_normal((2, n))
    block = kron(Orthogonal(q.factors))
    np.testing.assert_allclose(q.apply(x), (x.reshape(2, repeat, -1) @ block).reshape(2, n), atol=1e-12)


def test_blocks_of_256_are_exact_in_half_precision() -> None:
    for factor in r4(256, BLOCKS).factors:
        assert set(np.unique(factor)) == {-0.25, 0.25}


def test_an_odd_size_has_no_blocks() -> None:
    with pytest.raises(RotationError, match="odd"):
        BLOCKS.r1(9)


@pytest.mark.parametrize("rotation", [ALL, BLOCKS], ids=["full", "block"])
@pytest.mark.parametrize("n", [0, -4])
def test_no_rotation_of_nothing(n: int, rotation: Rotation) -> None:
    with pytest.raises(RotationError, match="does not exist"):
        rotation.r4(n)


@pytest.mark.parametrize("rotation", [ALL, BLOCKS], ids=["full", "block"])
def test_repeat_rotates_every_head_alike(rotation: Rotation) -> None:
    head = rotation.r2(20, 0)
    assert head is not None
    heads = head.with_repeat(3)
    assert heads.n == 60
    np.testing.assert_allclose(heads.dense(), np.kron(np.eye(3), head.dense()), atol=1e-15)
    np.testing.assert_allclose(heads.with_repeat(2).dense(), kron(head.with_repeat(6)), atol=1e-15)


def test_outliers_are_spread() -> None:
    x = np.zeros(1536)
    x[7] = 1.0
    np.testing.assert_allclose(np.abs(r1(1536).apply(x)), 1 / np.sqrt(1536))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(RotationError, match="order 64"):
        r1(64).apply(np.ones((64, 63)))
    with pytest.raises(RotationError, match="signs"):
        Orthogonal((np.eye(4),), 2, np.ones(4))
    with pytest.raises(RotationError, match="factors"):
        Orthogonal((np.ones((2, 3)),))
    with pytest.raises(RotationError, match="0 times"):
        Orthogonal((np.eye(2),), 0)


# Sites and signs


def test_a_site_that_is_off_has_no_matrix() -> None:
    off = Rotation.parse("none")
    assert (off.r1(64), off.r2(64, 0), off.r3(64), off.r4(64)) == (None, None, None, None)
    np.testing.assert_array_equal(off.r4_signs(5), np.ones(5))
    only = Rotation.parse("r3")
    assert only.r3(64) is not None
    assert only.r1(64) is None


def test_folded_sites_carry_signs_and_online_ones_do_not() -> None:
    r2, r3 = ALL.r2(64, 0), ALL.r3(64)
    assert r2 is not None
    assert r3 is not None
    assert r1(64).signs is not None
    assert r2.signs is not None
    assert r3.signs is None
    assert r4(64).signs is None
    assert not np.array_equal(r1(64).signs, r2.signs)
    assert not np.array_equal(r2.signs, ALL.r4_signs(64))


def test_signs_are_balanced_and_follow_the_seed() -> None:
    signs = [Rotation(frozenset(SITES), seed=seed).r4_signs(11008) for seed in range(3)]
    for s in signs:
        assert set(np.unique(s)) == {-1.0, 1.0}
        assert abs(s.mean()) < 0.05
    assert abs((signs[0] * signs[1]).mean()) < 0.05
    assert not np.array_equal(r1(576).signs, r1(576, Rotation(frozenset(SITES), seed=1)).signs)
    assert not np.array_equal(r1(576).signs, r1(1152).signs[:576])  # type: ignore[index]


def test_equal_rotations_share_their_matrices() -> None:
    assert Rotation.parse("r1").r1(576) is Rotation.parse(["r1"]).r1(576)
    assert r1(576).factors[0] is r4(576).factors[0]
    with pytest.raises(ValueError, match="read-only"):
        r1(576).factors[0][0, 0] = 0


# Basis

DIMS = {"r1": 576, "r2": 64, "r3": 64, "r4": [1536, 1538]}


def test_basis_is_the_same_in_every_process() -> None:
    program = f"from rqc.models.rotation import *; print(Rotation.parse('r1,r2,r3,r4', seed=5).basis({DIMS!r}))"
    expected = Rotation.parse(["r4", "r3", "r2", "r1"], seed=5).basis(DIMS)
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
        assert run.stdout.strip() == expected


def test_basis_is_frozen() -> None:
    """Adapters on disk name it: a change here breaks every one of them."""
    assert Rotation.parse("r1").basis({"r1": 18}) == (
        "f596c8575f9d06ed93596200081a9d3df4f53daec1d0b7acbedb9ad937e72767"
    )
    assert Rotation.parse("r1,r4").basis({"r1": 576, "r4": 1536}) == (
        "c1140b5d1590aac81c6bad0784cf79141ea63ee9916a5412073ad428a9343ffc"
    )
    assert Rotation.parse("r1,r2,r3,r4", "block", 3).basis(DIMS) == (
        "db56d2e839ed4d9ada971c2d9fe4018fe68bf37992fe063bddd3452365760deb"
    )


def test_basis_tells_matrices_apart() -> None:
    different = [
        Rotation.parse("none").basis(DIMS),
        Rotation.parse("r1").basis(DIMS),
        Rotation.parse("r4").basis(DIMS),
        Rotation.parse("r1,r4").basis(DIMS),
        Rotation.parse("r1,r4").basis({**DIMS, "r4": 1536}),
        Rotation.parse("r1,r4", seed=1).basis(DIMS),
        Rotation.parse("r1,r4", "block").basis(DIMS),
    ]
    assert len(set(different)) == len(different)


def test_basis_ignores_what_is_not_in_the_matrices() -> None:
    base = Rotation.parse("r1,r4").basis(DIMS)
    assert Rotation.parse("r4, r1").basis({"r4": (1538, 1536, 1536), "r1": [576], "r2": 9}) == base
    assert Rotation.parse("r3", seed=1).basis(DIMS) == Rotation.parse("r3").basis(DIMS)  # r3 has no signs


def test_basis_needs_every_active_size() -> None:
    with pytest.raises(RotationError, match="r4"):
        Rotation.parse("r1,r4").basis({"r1": 576})


# Text and JSON


@pytest.mark.parametrize("text", ["none", "r1", "r1,r4", "r1,r2,r3,r4"])
def test_parse_is_idempotent(text: str) -> None:
    rotation = Rotation.parse(text, "block", 7)
    assert str(rotation) == text
    assert Rotation.parse(str(rotation), "block", 7) == rotation
    assert Rotation.from_json(json.loads(json.dumps(rotation.to_json()))) == rotation
    assert Rotation.from_json({**rotation.to_json(), "basis": "0" * 64}).to_json() == rotation.to_json()
    assert hash(rotation) == hash(Rotation.parse(rotation.to_json()["sites"], "block", 7))


@pytest.mark.parametrize("text", ["", "r5", "r1,r1", "r1,,r4", "none,r1", "auto", ["r1", "r1"], ["R1"]])
def test_bad_names_are_refused(text: str | list[str]) -> None:
    with pytest.raises(RotationError) as error:
        Rotation.parse(text)
    assert error.value.hint


@pytest.mark.parametrize(("kind", "seed"), [("half", 0), ("full", -1), ("full", 1.5), ("full", True), ("full", None)])
def test_bad_settings_are_refused(kind: str, seed: int) -> None:
    with pytest.raises(RotationError):
        Rotation.parse("r1", kind, seed)


@pytest.mark.parametrize(
    "change", [{"sites": "r1"}, {"sites": None}, {"sites": [1]}, {"sites": ["r9"]}, {"seed": "0"}, {"hadamard": 1}]
)
def test_bad_json_is_refused(change: dict[str, object]) -> None:
    good = Rotation.parse("r1").to_json()
    with pytest.raises(RotationError):
        Rotation.from_json({**good, **change})
    with pytest.raises(RotationError, match=next(iter(change))):
        Rotation.from_json({key: value for key, value in good.items() if key not in change})


def test_online_factors_are_scaled_hadamards() -> None:
    """What the lowering relies on when it moves the scale into the down projection."""
    a, b = r4(1536).factors
    np.testing.assert_array_equal(np.rint(a * np.sqrt(48)), hadamard(48))
    np.testing.assert_array_equal(np.rint(b * np.sqrt(32)), hadamard(32))
