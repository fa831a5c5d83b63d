"""Sampling draws from the distribution it names, against full-sort references."""

from __future__ import annotations

import numpy as np
import pytest

from rqc.runtime.errors import EngineFormatError
from rqc.runtime.sampling import Sampler, largest


def softmax(logits, temperature=1.0):
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def reference(logits, temperature, top_k, top_p):
    """The distribution after temperature, top-k and top-p, by full sorts in float64 (transformers' order)."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    p = softmax(logits[order], temperature)
    order = order[: int(np.searchsorted(np.cumsum(p), top_p, side="left")) + 1] if top_p < 1 else order
    result = np.zeros(len(logits))
    result[order] = softmax(logits[order], temperature)
    return result


@pytest.mark.parametrize("vocab", [1, 2, 17, 255, 1000, 40000])
@pytest.mark.parametrize("levels", [0, 5])
def test_largest_is_a_stable_full_sort(vocab, levels):
    rng = np.random.default_rng(vocab)
    values = rng.standard_normal(vocab).astype(np.float32)
    if levels:
        values = np.round(values * levels) / levels  # many equal values
    for count in {1, 2, 3, 50, vocab // 3, vocab - 1, vocab} - {0}:
        if count <= vocab:
            expected = np.argsort(-values, kind="stable")[:count]
            np.testing.assert_array_equal(largest(values, count), expected)


def test_greedy_takes_the_first_of_the_best():
    logits = np.array([1, 5, 3, 5], np.float32)
    assert Sampler()(logits) == 1
    assert Sampler(temperature=1e-30, seed=0)(np.array([1, 5, 3], np.float32)) == 1
    assert Sampler(temperature=1.0, top_k=1, seed=0)(logits) == 1
    assert Sampler(temperature=1.0, top_p=1e-9, seed=0)(logits) == 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 7, 1.0), (1.0, 0, 0.8), (1.3, 9, 0.7), (2.0, 0, 0.99), (1.0, 5000, 1.0)],
)
@pytest.mark.parametrize("vocab", [40, 1500])
def test_draws_follow_the_distribution(temperature, top_k, top_p, vocab):
    """Frequencies within what chance explains, token by token and in total, and nothing outside the support."""
    logits = (np.random.default_rng(3).standard_normal(vocab) * 2).astype(np.float32)
    expected = reference(logits, temperature, min(top_k, vocab), top_p)
    sampler, draws = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=5), 6000
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=vocab)
    assert not counts[expected == 0].any()
    variation = np.abs(counts / draws - expected).sum() / 2
    chance = np.sqrt(2 * expected * (1 - expected) / (np.pi * draws)).sum() / 2  # its mean under the hypothesis
    assert variation <= 2 * chance
    assert np.all(np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)) + 1)


def test_impossible_tokens_are_never_drawn():
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 700]] = [0.0, 0.1]
    for options in ({}, {"top_k": 50}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.999}):
        sampler = Sampler(temperature=1.0, seed=1, **options)
        assert {sampler(logits) for _ in range(200)} == {3, 700}


def test_seeds():
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)

    def draw(seed):
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler(logits) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_the_logits_are_left_alone():
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    copy = logits.copy()
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}):
        Sampler(temperature=0.5, seed=0, **options)(logits)
    np.testing.assert_array_equal(logits, copy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_must_be_numbers(value, temperature):
    with pytest.raises(EngineFormatError, match="not finite"):
        Sampler(temperature=temperature)(np.array([0, value, 1], np.float32))
