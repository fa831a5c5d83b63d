"""EoRA: what is left of the objective is the tail of its spectrum, no branch of equal rank is better, and a budget goes
where it takes off most."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.models.eora import eora, ranks_by_budget, spectrum, tail
from rqc.models.grid import Grid, quantize
from rqc.models.loftq import truncated_svd
from rqc.models.moments import Moments
from rqc.runtime.errors import CheckpointError, SchemeError

Array = NDArray[np.float64]
SHAPES = [(96, 160), (160, 96), (64, 64)]
RANK = 12


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def activations(tokens: int, width: int, seed: int = 1) -> Array:
    """Correlated, with loud channels, as a decoder block's are: x [tokens, width]."""
    generator = draw(seed)
    mixing = generator.standard_normal((width, width)) * np.exp(-np.arange(width) / 24)[:, None]
    x = generator.standard_normal((tokens, width)) @ mixing
    x[:, ::17] *= 20
    return x


def case(shape: tuple[int, int], tokens: int = 2000) -> tuple[Array, Array, Array]:
    """W, Ŵ on a 3-bit grid, and x."""
    w = draw().standard_normal(shape)
    return w, quantize(w, Grid(3, 32)).dequantize().astype(np.float64), activations(tokens, shape[1])


def moment(x: Array, other: Array | None = None) -> Array:
    return x.T @ (x if other is None else other) / len(x)


def objective(difference: Array, delta: Delta, x: Array) -> float:
    """√E‖(ΔW - B A) x‖², token by token."""
    return float(np.linalg.norm((difference - delta.dense()) @ x.T) / np.sqrt(len(x)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [2000, 50])
def test_what_is_left_is_the_tail_of_the_singular_values(shape: tuple[int, int], tokens: int) -> None:
    """Invariant (a), against NumPy's decomposition of ΔW Xᵀ, which knows no second moments; (e): few tokens will do."""
    w, quantized, x = case(shape, tokens)
    values = np.linalg.svd((w - quantized) @ x.T / np.sqrt(len(x)), compute_uv=False)
    found = spectrum(w - quantized, moment(x))
    for rank in (1, RANK, 40):
        delta = eora(w - quantized, moment(x), rank)
        assert np.isfinite(delta.dense()).all()
        left = objective(w - quantized, delta, x)
        assert left == pytest.approx(tail(values, rank), rel=1e-8)
        assert left == pytest.approx(tail(found, rank), rel=1e-8)
    assert tail(found, 0) == pytest.approx(np.linalg.norm((w - quantized) @ x.T) / np.sqrt(len(x)), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_more_rank_than_tokens_leaves_nothing(shape: tuple[int, int]) -> None:
    w, quantized, x = case(shape, 20)
    delta = eora(w - quantized, moment(x), 40)
    assert objective(w - quantized, delta, x) <= 1e-7 * tail(spectrum(w - quantized, moment(x)), 0)
    assert np.linalg.norm(w - quantized - delta.dense()) <= np.linalg.norm(w - quantized) * (1 + 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [2000, 50])
def test_no_other_branch_of_the_rank_is_better(shape: tuple[int, int], tokens: int) -> None:
    """Invariant (b): plain SVD and ACT-S (inputs scaled by their norms); the former is nearer to ΔW itself."""
    w, quantized, x = case(shape, tokens)
    difference, rank = w - quantized, RANK
    norms = np.sqrt(np.diagonal(moment(x)))
    plain = Delta(*reversed(truncated_svd(difference, rank)))
    b, a = truncated_svd(difference * norms, rank)
    scaled = Delta(a / norms, b)
    best = eora(difference, moment(x), rank)
    assert objective(difference, best, x) < objective(difference, plain, x)
    assert objective(difference, best, x) < objective(difference, scaled, x)
    assert np.linalg.norm(difference - plain.dense()) < np.linalg.norm(difference - best.dense())


@pytest.mark.parametrize("shape", SHAPES)
def test_without_correlations_it_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    """Invariant (c)."""
    w, quantized, _ = case(shape)
    b, a = truncated_svd(w - quantized, RANK)
    found = eora(w - quantized, np.eye(shape[1]), RANK)
    np.testing.assert_allclose(found.dense(), b @ a, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(found.a, axis=1), np.linalg.norm(found.b, axis=0), rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_turns_with_the_basis(shape: tuple[int, int]) -> None:
    """Invariant (d): x -> x H, W -> W H gives A -> A H and the same B, up to the signs of their pairs."""
    w, quantized, x = case(shape)
    turn = np.linalg.qr(draw(5).standard_normal((shape[1], shape[1])))[0]
    found = eora(w - quantized, moment(x), RANK)
    turned = eora((w - quantized) @ turn, moment(x @ turn), RANK)
    np.testing.assert_allclose(turned.dense(), found.dense() @ turn, atol=1e-9)
    np.testing.assert_allclose(np.abs(turned.b), np.abs(found.b), atol=1e-8)


def test_a_lower_rank_is_the_front_of_a_higher() -> None:
    w, quantized, x = case((96, 160))
    low, high = (eora(w - quantized, moment(x), rank) for rank in (5, 30))
    np.testing.assert_allclose(high.b[:, :5] @ high.a[:5], low.dense(), atol=1e-10)


def test_the_scale_of_the_moments_changes_nothing() -> None:
    """A sum over tokens serves as well as a mean."""
    w, quantized, x = case((96, 160))
    mean, total = (eora(w - quantized, factor * moment(x), RANK) for factor in (1.0, float(len(x))))
    np.testing.assert_allclose(np.abs(mean.b), np.abs(total.b), atol=1e-9)
    np.testing.assert_allclose(mean.dense(), total.dense(), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_to_make_up_for_is_a_branch_that_can_still_learn(shape: tuple[int, int]) -> None:
    """A row of A and a column of B that are both zero would stay so."""
    x = activations(2000, shape[1])
    exact = draw(4).standard_normal((shape[0], 3)) @ draw(5).standard_normal((3, shape[1]))
    for difference in (np.zeros(shape), exact):
        found = eora(difference, moment(x), 8)
        np.testing.assert_allclose(found.dense(), difference, atol=1e-8)
        assert (np.linalg.norm(found.a, axis=1) > 1e-12).all()
    assert not eora(np.zeros(shape), moment(x), 8).b.any()


def rounded(x: Array, bits: int = 4) -> Array:
    """Every token on its own symmetric grid."""
    scale = np.abs(x).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    values: Array = np.rint(x / scale) * scale
    return values


def rounded_objective(w: Array, quantized: Array, delta: Delta, x: Array, there: Array) -> float:
    return float(np.linalg.norm(x @ w.T - there @ (quantized + delta.dense()).T) / np.sqrt(len(x)))


def crossed(x: Array, there: Array) -> Moments:
    moments = Moments(x.shape[1], crossed=True)
    moments.add(there, x)
    return moments


def reduced_rank(w: Array, quantized: Array, moments: Moments) -> Delta:
    return eora(moments.suited(w, 1e-10) - quantized, moments.second, RANK)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [2000, 50])
def test_rounded_activations_are_made_up_for_too(shape: tuple[int, int], tokens: int) -> None:
    """On its own objective it is below EoRA, which sees the weights' error alone, and below every perturbation."""
    w, quantized, x = case(shape, tokens)
    there = rounded(x)
    moments = crossed(x, there)
    found = reduced_rank(w, quantized, moments)
    least = rounded_objective(w, quantized, found, x, there)
    for second in (moment(x), moments.second):
        assert least < rounded_objective(w, quantized, eora(w - quantized, second, RANK), x, there)
    generator = draw(9)
    for size in (1e-3, 1e-2):
        a, b = (factor + size * generator.standard_normal(factor.shape) for factor in (found.a, found.b))
        assert least <= rounded_objective(w, quantized, Delta(a, b), x, there)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_rounded_form_leaves_is_its_tail_and_what_no_weight_could_make_up_for(shape: tuple[int, int]) -> None:
    w, quantized, x = case(shape)
    there = rounded(x)
    moments = crossed(x, there)
    regression = np.linalg.lstsq(there, x @ w.T, rcond=None)[0]
    floor = np.linalg.norm(x @ w.T - there @ regression) ** 2 / len(x)
    left = rounded_objective(w, quantized, reduced_rank(w, quantized, moments), x, there) ** 2
    values = spectrum(moments.suited(w, 1e-10) - quantized, moments.second / len(x))
    assert left == pytest.approx(floor + tail(values, RANK) ** 2, rel=1e-5)  # products of moments are float32


def test_a_budget_goes_where_it_takes_off_most() -> None:
    """The optimum of all choices that cost no more, by trying them; more is never worse."""
    generator = draw(2)
    shapes = {"a": (4, 4), "b": (6, 2), "c": (3, 5)}  # 8 entries a rank, each
    spectra = {name: np.sort(generator.random(min(shape)))[::-1] for name, shape in shapes.items()}
    every = [range(min(shape) + 1) for shape in shapes.values()]
    for budget in range(0, 90, 8):
        chosen = ranks_by_budget(spectra, shapes, budget)

        def left(ranks: dict[str, int]) -> float:
            return sum(tail(spectra[name], rank) ** 2 for name, rank in ranks.items())

        affordable = [
            dict(zip(shapes, ranks, strict=True)) for ranks in itertools.product(*every) if 8 * sum(ranks) <= budget
        ]
        assert sum(chosen.values()) * 8 <= budget
        assert left(chosen) == pytest.approx(min(map(left, affordable)), rel=1e-12)


def test_a_budget_counts_entries() -> None:
    """Of equal spectra the smaller linear is served first; what is zero is not bought; the rest goes to who can pay."""
    spectra = {"wide": np.array([1.0, 1.0]), "small": np.array([1.0, 0.0]), "none": np.zeros(2)}
    shapes = {"wide": (100, 100), "small": (5, 5), "none": (2, 2)}
    assert ranks_by_budget(spectra, shapes, 150) == {"wide": 0, "small": 1, "none": 0}
    assert ranks_by_budget(spectra, shapes, 10**6) == {"wide": 2, "small": 1, "none": 0}
    assert ranks_by_budget(spectra, shapes, 0) == dict.fromkeys(shapes, 0)


def test_input_that_makes_no_sense_is_refused() -> None:
    w, quantized, x = case((64, 64))
    for rank in (0, 65):
        with pytest.raises(SchemeError, match=f"rank {rank} "):
            eora(w - quantized, moment(x), rank)
    bad = moment(x)
    bad[3, 5] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        eora(w - quantized, bad, 4)
