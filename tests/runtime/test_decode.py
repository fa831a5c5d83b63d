"""Caches are invisible: however a sequence is cut into calls, batched or grown, the function is the same."""

from __future__ import annotations

import numpy as np
import pytest

from rqc.runtime.backends.ort import OrtBackend
from rqc.runtime.container import EngineFile

TOLERANCE = 5e-5  # absolute, on logits of a few units: float32 sums in another order


def prompt(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 320, length).tolist()


def greedy_by_recomputation(engine, ids: list[int], count: int) -> list[int]:
    """The oracle: every token from a full forward pass over everything before it."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(np.argmax(engine.logits(ids)[-1])))
    return ids[-count:]


@pytest.mark.parametrize("window", [-1, 5])
def test_both_graphs_compute_the_same(engine, window):
    ids = prompt(60)
    shared, concat = (engine(cache=cache, window=window).logits(ids) for cache in ("shared", "concat"))
    assert shared.shape == (60, 320)
    assert shared.dtype == np.float32
    np.testing.assert_allclose(shared, concat, rtol=0, atol=TOLERANCE)


def test_logits_are_causal(engine, cache):
    ids = prompt(40)
    loaded = engine(cache=cache)
    np.testing.assert_allclose(loaded.logits(ids)[:17], loaded.logits(ids[:17]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"head_positions": False}])
def test_incremental_decoding_is_full_recomputation(engine, cache, changes):
    loaded = engine(cache=cache, **changes)
    ids = prompt(12)
    assert loaded.generate_ids(ids, max_new_tokens=20) == greedy_by_recomputation(loaded, ids, 20)


def test_positions_are_fed_when_rotation_stays_in_the_graph(engine):
    ids = [prompt(12), prompt(3, seed=2)]
    online = engine(online_rope=True).generate_ids(ids, max_new_tokens=20)
    assert online == engine().generate_ids(ids, max_new_tokens=20)


@pytest.mark.parametrize("length", [1, 7, 8, 20, 65])
@pytest.mark.parametrize("window", [-1, 5])
def test_chunked_prefill_is_prefill_in_one_piece(engine_path, cache, length, window):
    with EngineFile.open(engine_path(cache=cache, window=window)) as file:
        whole, chunked = (OrtBackend(file, threads=1, chunk=chunk) for chunk in (512, 7))
    ids = np.array(prompt(length))
    np.testing.assert_allclose(
        np.concatenate(list(chunked.score(ids))), np.concatenate(list(whole.score(ids))), rtol=0, atol=TOLERANCE
    )
    pair = [backend.start([ids, ids[:1]]) for backend in (whole, chunked)]
    for step in range(5):
        logits = [state[1] for state in pair]
        np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=TOLERANCE)
        pair = [(sequences, sequences.step(np.array([step, 9])).copy()) for sequences, _ in pair]


def test_the_buffer_grows_by_powers_of_two_up_to_the_context(engine_path):
    with EngineFile.open(engine_path(context=700)) as file:
        backend = OrtBackend(file, threads=1)
    sequences, _ = backend.start([np.array(prompt(250)), np.array(prompt(3))])
    capacities = []
    for _ in range(440):
        sequences.step(np.array([1, 2]))
        capacities.append(sequences.capacity)
    assert sorted(set(capacities)) == [256, 512, 700]
    assert sequences.lengths.tolist() == [690, 443]


def test_growing_changes_nothing(engine):
    ids = prompt(250)
    tokens = engine(cache="shared").generate_ids(ids, max_new_tokens=300)
    assert tokens == engine(cache="concat").generate_ids(ids, max_new_tokens=300)
    tail = engine(cache="shared").logits((ids + tokens)[:-1])[-40:]
    assert np.argmax(tail, axis=1).tolist() == tokens[-40:]


@pytest.mark.parametrize("window", [-1, 5])
def test_a_batch_gives_what_each_prompt_gives_alone(engine, cache, window):
    loaded = engine(cache=cache, window=window)
    prompts = [prompt(length, seed=length) for length in (1, 9, 4, 30)]
    batch = loaded.generate_ids(prompts, max_new_tokens=40)
    assert batch == [loaded.generate_ids(ids, max_new_tokens=40) for ids in prompts]
    texts = loaded.generate(["the cat", "a dog ran to"], max_new_tokens=10)
    assert texts == [loaded.generate(text, max_new_tokens=10) for text in ("the cat", "a dog ran to")]


def test_rows_end_one_by_one(engine, cache):
    """With a token that some rows reach early as end of text, each row stops where it would alone."""
    prompts = [prompt(length, seed=length) for length in (2, 9, 4, 30, 5)]
    free = engine(cache=cache).generate_ids(prompts, max_new_tokens=40)
    counts = {token: len({row.index(token) for row in free if token in row}) for row in free for token in row}
    end = max(counts, key=counts.__getitem__)
    assert counts[end] >= 2
    loaded = engine(cache=cache, eos=(end,))
    stopped = loaded.generate_ids(prompts, max_new_tokens=40)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
    assert loaded.last_finish_reasons == ["stop" if end in row else "length" for row in free]


def test_keeping_rows_keeps_their_futures(engine_path, cache):
    with EngineFile.open(engine_path(cache=cache)) as file:
        backend = OrtBackend(file, threads=1)
    prompts = [np.array(prompt(length)) for length in (30, 2, 11)]
    alone, _ = backend.start([prompts[2]])
    rows, _ = backend.start(prompts)
    alone.step(np.array([5]))
    rows.step(np.array([3, 4, 5]))
    rows.keep([2])
    assert rows.lengths.tolist() == [12]
    np.testing.assert_allclose(rows.step(np.array([6])), alone.step(np.array([6])), rtol=0, atol=TOLERANCE)
