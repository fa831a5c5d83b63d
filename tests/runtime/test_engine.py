"""The engine's contract with its callers: ends, limits, errors, and that nothing breaks it for the next call."""

from __future__ import annotations

import logging
import os
import signal
import threading

import numpy as np
import onnx_ir
import pytest

import rqc
from rqc.compiler.plan import write_engine
from rqc.runtime.backends.session import _refuse_inexact_windows
from rqc.runtime.engine import Engine
from rqc.runtime.errors import EngineFormatError, InputError, TargetError


class Scripted:
    """A backend that says what it is told to: row r gets scripts[r], token by token."""

    threads = 1
    vocab_size = 320

    def __init__(self, *scripts: list[int]) -> None:
        self.scripts = scripts
        self.lengths = np.zeros(len(scripts), np.int64)

    def start(self, prompts, gates=None):
        self.rows, self.place = list(range(len(prompts))), 0
        return self, self._logits()

    def step(self, tokens):
        assert tokens.tolist() == [self.scripts[row][self.place] for row in self.rows]
        self.place += 1
        return self._logits()

    def keep(self, rows):
        self.rows = [self.rows[row] for row in rows]

    def close(self):
        pass

    def _logits(self):
        logits = np.zeros((len(self.rows), self.vocab_size), np.float32)
        for place, row in enumerate(self.rows):
            logits[place, self.scripts[row][self.place]] = 9
        return logits


@pytest.fixture
def says(engine):
    """An engine that continues any prompt with these texts."""

    def make(*texts: str, **changes) -> Engine:
        loaded = engine(**changes)
        loaded._backend = Scripted(*(loaded.tokenize(text) + [97] * 200 for text in texts))
        return loaded

    return make


def test_text_is_the_decoded_tokens(engine, cache):
    loaded = engine(cache=cache)
    text = loaded.generate("the cat", max_new_tokens=30)
    assert text == loaded.detokenize(loaded.generate_ids("the cat", max_new_tokens=30))
    assert text == "".join(loaded.stream("the cat", max_new_tokens=30))
    assert text == loaded.generate(loaded.tokenize("the cat"), max_new_tokens=30)
    assert loaded.last_finish_reason == "length"


@pytest.mark.parametrize("wrap", [tuple, np.array, lambda ids: np.array(ids, np.int32)])
def test_ids_come_in_any_sequence(engine, wrap):
    loaded = engine()
    assert loaded.generate_ids(wrap([1, 2, 3]), max_new_tokens=5) == loaded.generate_ids([1, 2, 3], max_new_tokens=5)
    assert len(loaded.generate(np.array([[1, 2], [3, 4]]), max_new_tokens=5)) == 2


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("STOP", "one two "),
        (["STOP"], "one two "),
        (["nowhere", " two"], "one"),
        (["o STOP", "STOP"], "one tw"),
        (["two STOP!", "o S"], "one tw"),  # "o S" is complete first
        ("one", ""),
        ("absent", None),
    ],
)
def test_stop_strings_are_cut_off(says, stop, expected):
    loaded = says("one two STOP! three")
    options = {"max_new_tokens": 25, "stop": stop}
    whole = loaded.generate("x", max_new_tokens=25)
    assert whole.startswith("one two STOP! three")
    assert loaded.generate("x", **options) == (whole if expected is None else expected)
    assert loaded.last_finish_reason == ("length" if expected is None else "stop")
    pieces = list(loaded.stream("x", **options))
    assert "".join(pieces) == (whole if expected is None else expected)
    assert all(pieces)


def test_stop_strings_in_a_batch(says):
    loaded = says("one STOP", "one two three four", "STOP")
    assert loaded.generate(["a", "b", "c"], max_new_tokens=12, stop="STOP")[::2] == ["one ", ""]
    assert loaded.last_finish_reasons == ["stop", "length", "stop"]


def test_what_was_held_back_for_a_stop_string_comes_out_at_the_end(says):
    text = "one STO"
    loaded = says(text)
    count = len(loaded.tokenize(text))
    assert loaded.generate("x", max_new_tokens=count, stop="STOP") == text
    assert "".join(loaded.stream("x", max_new_tokens=count, stop="STOP")) == text


def test_pieces_are_whole_characters(says):
    text = "a 👩‍👩‍👧 b 🎉🎉 ümlaut 漢字 done"
    loaded = says(text)
    count = len(loaded.tokenize(text))
    assert count > len(text) - 5  # the emoji take several tokens each
    pieces = list(loaded.stream("x", max_new_tokens=count))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_by_the_limit_is_marked(says):
    loaded = says("🎉")
    assert len(loaded.tokenize("🎉")) > 1
    assert loaded.generate("x", max_new_tokens=1) == "\ufffd" == "".join(loaded.stream("x", max_new_tokens=1))


def test_end_of_text_is_not_text(engine):
    loaded = engine(eos=(0,))
    loaded._backend = Scripted([5, 6, 0, 7])
    assert loaded.generate_ids([1]) == [5, 6]
    assert loaded.last_finish_reason == "stop"
    loaded._backend = Scripted([0])
    assert loaded.generate("x") == ""


def test_generation_ends_at_the_context_and_says_so(engine, cache, caplog):
    loaded, longer = engine(cache=cache, context=64), engine(cache=cache)
    ids = list(range(60))
    with caplog.at_level(logging.WARNING, "rqc.runtime"):
        tokens = loaded.generate_ids([ids, ids[:10]], max_new_tokens=20)
    assert tokens == [
        longer.generate_ids(ids, max_new_tokens=4),
        longer.generate_ids(ids[:10], max_new_tokens=20),
    ]
    assert loaded.last_finish_reasons == ["context", "length"]
    assert ["64 tokens (prompt 60, new 4)" in record.message for record in caplog.records] == [True]


def test_a_prompt_that_fills_the_context_leaves_no_room(engine):
    loaded = engine(context=64)
    assert loaded.generate_ids(list(range(64))) == []
    assert loaded.last_finish_reason == "context"
    for call in (loaded.generate, loaded.stream, loaded.logits, loaded.iter_logits):
        with pytest.raises(InputError, match=r"65 tokens.* 64"):
            call(list(range(65)))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        [],
        [[]],
        [""],
        [[1], []],
        [-1],
        [320],
        [1, 2.5],
        [True],
        [1, None],
        ["a", 1],
        [1, "a"],
        [[1, "a"]],
        [[[1]]],
        b"bytes",
        None,
        7,
        {"a": 1},
        "\ud800",
        np.array(3),
        np.array([0.5]),
    ],
    ids=repr,
)
def test_bad_prompts(engine, bad):
    loaded = engine()
    for call in (loaded.generate, loaded.generate_ids, loaded.stream):
        with pytest.raises(InputError):
            call(bad)


@pytest.mark.parametrize("bad", ["text", [], [400], [[1, 2]], [0.5], None], ids=repr)
def test_bad_ids_for_logits(engine, bad):
    with pytest.raises(InputError):
        engine().logits(bad)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": -1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": [1, 2]},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": 5},
        {"stop": [5]},
        {"adapter": "some"},
    ],
    ids=repr,
)
def test_bad_options(engine, option):
    loaded = engine()
    for call in (loaded.generate, loaded.stream):
        with pytest.raises(InputError) as caught:
            call("the cat", **option)
        assert next(iter(option)) in caught.value.message + caught.value.hint


def test_stream_takes_one_prompt(engine):
    with pytest.raises(InputError, match="one prompt"):
        engine().stream(["a", "b"])


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2", 10**9])
def test_bad_threads(engine_path, bad):
    with pytest.raises(InputError, match="threads"):
        Engine.load(engine_path(), threads=bad)


def test_sampling_is_reproducible_row_by_row(engine, cache):
    loaded = engine(cache=cache)
    options = {"max_new_tokens": 25, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = loaded.generate_ids([1, 2, 3], seed=7, **options)
    assert first == loaded.generate_ids([1, 2, 3], seed=7, **options)
    assert first != loaded.generate_ids([1, 2, 3], seed=8, **options)
    assert loaded.generate_ids([[9, 9], [1, 2, 3]], seed=7, **options)[1] == first
    two = loaded.generate_ids([[1, 2, 3]] * 2, seed=[8, 7], **options)
    assert two[1] == first != two[0]
    assert loaded.generate_ids([1, 2, 3], **options) != loaded.generate_ids([1, 2, 3], **options)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal to this process")
def test_an_interrupt_leaves_the_engine_usable(engine, cache):
    loaded = engine(cache=cache)
    before = loaded.generate_ids([1, 2, 3], max_new_tokens=30)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))

    def forever() -> None:
        while True:
            loaded.generate([[1, 2, 3], [4]], max_new_tokens=500)

    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            forever()
    finally:
        timer.cancel()
    assert loaded.last_finish_reasons in ([None, None], ["length", "length"])
    assert loaded.generate_ids([1, 2, 3], max_new_tokens=30) == before


def test_an_abandoned_stream_leaves_the_engine_usable(engine, cache):
    loaded = engine(cache=cache)
    before = loaded.generate("the cat", max_new_tokens=30)
    streams = [loaded.stream("the cat", max_new_tokens=30), loaded.stream("a dog", max_new_tokens=30)]
    next(streams[1])
    assert loaded.last_finish_reason is None
    assert "".join(streams[0]) == before  # two at once do not mix
    assert loaded.last_finish_reason == "length"


def test_a_closed_engine_says_so(engine_path):
    with rqc.load(engine_path()) as loaded:
        loaded.generate("a", max_new_tokens=1)
    for call in (lambda: loaded.generate("a"), lambda: loaded.logits([1])):
        with pytest.raises(InputError, match="closed"):
            call()
    loaded.close()


def test_a_missing_tokenizer_leaves_ids(tmp_path, tiny_parts):
    model, manifest = tiny_parts()
    write_engine(tmp_path / "engine.plan", model, manifest, {})
    with Engine.load(tmp_path / "engine.plan", threads=1) as loaded:
        assert len(loaded.generate_ids([1, 2], max_new_tokens=3)) == 3
        for call in (lambda: loaded.generate([1]), lambda: loaded.tokenize("a")):
            with pytest.raises(InputError, match="no tokenizer"):
                call()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": "coreml"}, TargetError),
        ({"context_length": None}, EngineFormatError),
        ({"graph": None}, EngineFormatError),
    ],
)
def test_engines_that_cannot_run_here(tmp_path, tiny_parts, change, error):
    model, manifest = tiny_parts()
    kept = {key: value for key, value in {**manifest, **change}.items() if value is not None}
    write_engine(tmp_path / "engine.plan", model, kept, {})
    with pytest.raises(error):
        Engine.load(tmp_path / "engine.plan", threads=1)


def test_an_input_that_nobody_feeds(tmp_path, tiny_parts):
    model, manifest = tiny_parts()
    model.graph.inputs.append(onnx_ir.Value(name="mystery", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)))
    write_engine(tmp_path / "engine.plan", model, manifest, {})
    with pytest.raises(EngineFormatError, match="mystery"):
        Engine.load(tmp_path / "engine.plan", threads=1)


def test_a_graph_that_onnx_runtime_refuses(tmp_path, tiny_parts):
    model, manifest = tiny_parts()
    next(iter(model.graph)).op_type = "NoSuchOperator"
    write_engine(tmp_path / "engine.plan", model, manifest, {})
    with pytest.raises(EngineFormatError, match="NoSuchOperator"):
        Engine.load(tmp_path / "engine.plan", threads=1)


@pytest.mark.parametrize(
    ("window", "version", "refused"),
    [(5, "1.23.2", True), (4096, "1.30.0", True), (5, "1.31.1", False), (5, "2.0.0", False), (-1, "1.23.2", False)],
)
def test_windows_are_refused_where_the_kernel_is_off_by_one(tiny_parts, window, version, refused):
    model, _ = tiny_parts(window=window)
    graph = onnx_ir.to_proto(model).SerializeToString()
    if not refused:
        _refuse_inexact_windows(graph, version)
        return
    with pytest.raises(TargetError, match="sliding-window"):
        _refuse_inexact_windows(graph, version)


def test_logits_that_are_no_numbers_are_an_error(tmp_path, tiny_parts):
    model, manifest = tiny_parts()
    head = model.graph.initializers["head"]
    head.const_value = onnx_ir.tensor(np.full(head.shape.numpy(), np.nan, np.float32), name="head")
    write_engine(tmp_path / "engine.plan", model, manifest, {})
    with pytest.raises(EngineFormatError, match="not finite"):
        Engine.load(tmp_path / "engine.plan", threads=1).generate_ids([1])


def test_a_start_token_is_added_once(engine):
    loaded = engine(generation={"bos_token_id": 0, "add_bos": True})
    assert loaded.tokenize("cat") == [0, *loaded.tokenize("cat", special=False)]
    assert loaded.tokenize("<|end|>cat") == loaded.tokenize("cat")
    assert isinstance(loaded.generate("", max_new_tokens=2), str)  # the start token is a prompt
