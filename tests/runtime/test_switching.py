"""Switching adapters at run time: by call, by row of a batch, in both kinds of cache; other engines refuse names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from tiny_adapters import save_peft, talking

from rqc.compiler.api import compile_engine
from rqc.compiler.plan import write_engine
from rqc.runtime.engine import Engine
from rqc.runtime.errors import EngineFormatError, InputError
from rqc.runtime.options import adapter_gates

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}>"
FAMILIES = {"shared": "llama16", "concat": "llama"}
PROMPTS = ["Hello", "A much longer prompt", "no"]


@pytest.fixture(scope="module")
def switched(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """switched(cache) → an engine with the adapters poet and clerk, made once."""
    made: dict[str, Path] = {}

    def make(cache: str) -> Path:
        if cache not in made:
            folder = tmp_path_factory.mktemp(cache)
            directory = talking(tiny_model(FAMILIES[cache]), folder / "model")
            (directory / "chat_template.jinja").write_text(TEMPLATE)
            adapters = {
                name: save_peft(directory, folder / name, size=0.5, seed=seed)
                for seed, name in enumerate(("poet", "clerk"))
            }
            compile_engine(directory, folder / "e.plan", adapter=adapters, scheme="fp32", rotate="none")
            made[cache] = folder / "e.plan"
        return made[cache]

    return make


@pytest.fixture
def loaded(switched: Callable[[str], Path], cache: str) -> Any:
    with Engine.load(switched(cache), threads=1) as engine:
        assert engine.manifest["graph"]["cache"] == cache
        yield engine


def test_every_way_to_generate_takes_a_name(loaded: Engine) -> None:
    said = {}
    for name in (None, "poet", "clerk"):
        options: dict[str, Any] = {"max_new_tokens": 12, "adapter": name}
        said[name] = loaded.generate("Hello", **options)
        assert "".join(loaded.stream("Hello", **options)) == said[name]
        ids = loaded.tokenize("Hello")
        assert loaded.detokenize(loaded.generate_ids(ids, **options)) == said[name]
        messages = [{"role": "user", "content": "Hello"}]
        answer = loaded.chat(messages, **options)
        assert answer == loaded.generate("Hello>", **options) == "".join(loaded.stream_chat(messages, **options))
        last = loaded.logits(ids, adapter=name)[-1]
        assert loaded.generate_ids(ids, max_new_tokens=1, adapter=name)[:1] in ([int(last.argmax())], [])
        pieces = np.concatenate(list(loaded.iter_logits(ids, adapter=name)))
        np.testing.assert_array_equal(pieces, loaded.logits(ids, adapter=name))
    assert len(set(said.values())) == 3
    assert loaded.generate("Hello", max_new_tokens=12) == said[None]  # nothing sticks


def test_rows_of_a_batch_have_adapters_of_their_own(loaded: Engine) -> None:
    names = ["clerk", None, "poet"]
    for length in (3, 60):  # 60: rows leave the batch one by one where one ends
        together = loaded.generate_ids(PROMPTS, max_new_tokens=length, adapter=names)
        assert together == [
            loaded.generate_ids(prompt, max_new_tokens=length, adapter=name)
            for prompt, name in zip(PROMPTS, names, strict=True)
        ]
    every = loaded.generate_ids(PROMPTS, max_new_tokens=5, adapter="poet")
    assert every == loaded.generate_ids(PROMPTS, max_new_tokens=5, adapter=["poet"] * 3)


def test_rows_that_go_on_keep_their_adapters(loaded: Engine) -> None:
    """Gates move along when rows leave and when caches grow."""
    backend = loaded.model
    gates = adapter_gates(["clerk", None, "poet"], loaded.adapters, 3)
    ids = [np.asarray(loaded.tokenize(prompt)) for prompt in PROMPTS]
    rows, _ = backend.start(ids, gates)
    alone, _ = backend.start([ids[2]], adapter_gates("poet", loaded.adapters, 1))
    for step in range(4):
        token = 7 + step
        found = rows.step(np.full(len(rows.lengths), token))[-1].copy()
        np.testing.assert_allclose(found, alone.step(np.array([token]))[0], rtol=0, atol=1e-4)
        if step == 1:
            rows.keep([0, 2])


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("baker", "no adapter 'baker'"),
        ("", "no adapter ''"),
        (["poet", "clerk"], "2 adapters for 1 prompts"),
        ([3], "no adapter 3"),
        (3, "adapter is 3"),
        ({"poet": 1.0}, "adapter is"),
    ],
)
def test_names_that_it_does_not_know_are_refused(adapter: Any, told: str, switched: Callable[[str], Path]) -> None:
    with Engine.load(switched("shared"), threads=1) as engine:
        for call in (engine.generate, engine.stream):
            with pytest.raises(InputError, match=told) as error:
                call("Hello", adapter=adapter)
        with pytest.raises(InputError, match=told):
            engine.logits([1, 2], adapter=adapter)
        with pytest.raises(InputError, match=told):
            engine.iter_logits([1, 2], adapter=adapter)
        if told.startswith("no adapter"):
            assert error.value.hint == "it has poet, clerk; without adapter it is the model alone"


def test_an_engine_without_adapters_refuses_names(engine: Callable[..., Engine]) -> None:
    loaded = engine()
    assert loaded.adapters == ()
    assert loaded.generate("the cat", max_new_tokens=2, adapter=None) == loaded.generate("the cat", max_new_tokens=2)
    assert loaded.generate(["the", "cat"], max_new_tokens=2, adapter=[None, None])
    for call in (lambda: loaded.logits([1], adapter="poet"), lambda: loaded.generate("the", adapter="poet")):
        with pytest.raises(InputError, match="no adapter 'poet'") as error:
            call()
        assert "nothing in it can be switched" in error.value.hint


def test_gates() -> None:
    np.testing.assert_array_equal(adapter_gates(["b", None, "a"], ("a", "b"), 3), [[0, 1], [0, 0], [1, 0]])
    np.testing.assert_array_equal(adapter_gates(None, ("a", "b"), 2), np.zeros((2, 2)))
    assert adapter_gates(None, (), 2) is None


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"names": ["poet"]}, "names 1 adapters, its graph switches 0"),
        ({"names": "poet"}, "adapter.names is 'poet'"),
        ({"names": []}, r"adapter.names is '\[\]'"),
        ({"names": ["poet", 3]}, "adapter.names is"),
        ({"names": ["poet", "poet"]}, "a name twice"),
        ("poet", "adapter is 'poet'"),
    ],
)
def test_manifests_that_do_not_fit_the_graph(
    adapter: Any, told: str, tiny_parts: Callable[..., tuple[onnx_ir.Model, dict[str, Any]]], tmp_path: Path
) -> None:
    model, manifest = tiny_parts()

    def written_and_loaded() -> None:
        write_engine(tmp_path / "e.plan", model, {**manifest, "adapter": adapter}, {})
        Engine.load(tmp_path / "e.plan", threads=1)

    with pytest.raises(EngineFormatError, match=told):
        written_and_loaded()


@pytest.mark.parametrize(
    ("width", "told"), [(2, "names 0 adapters, its graph switches 2"), ("n", "does not state how many")]
)
def test_graphs_that_do_not_fit_the_manifest(
    width: Any, told: str, tiny_parts: Callable[..., tuple[onnx_ir.Model, dict[str, Any]]], tmp_path: Path
) -> None:
    model, manifest = tiny_parts()
    shape = onnx_ir.Shape(["batch", width])
    gates = onnx_ir.Value(name="adapter_gates", shape=shape, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    model.graph.inputs.append(gates)
    write_engine(tmp_path / "e.plan", model, manifest, {})
    with pytest.raises(EngineFormatError, match=told):
        Engine.load(tmp_path / "e.plan", threads=1)
