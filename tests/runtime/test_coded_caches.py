"""Caches of codes: however a sequence is cut into calls, batched or grown, the function is the same; sizes are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import TinyModel, give_voice

import rqc
from rqc.compiler.api import compile_engine
from rqc.runtime.backends.ort import OrtBackend
from rqc.runtime.backends.session import _refuse_coded_caches
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import TargetError
from rqc.runtime.inspection import inspect_engine

FORMS = [("llama16", "int8"), ("mistral", "int8"), ("llama", "int8"), ("llama16", "int4"), ("gemma3", "int4")]
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def path(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines with each form of a cache: in the kernel, with a window, and in steps."""
    name, cache = request.param
    engine = tmp_path_factory.mktemp(name) / f"{cache}.plan"
    options = {"calibration_samples": 2, "calibration_length": 64, "rotate": "r2,r3"}
    compile_engine(
        give_voice(tiny_model(name, initializer_range=0.1)), engine, scheme="fp32", kv_cache=cache, **options
    )
    return engine


def prompt(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(32, 96, length).tolist()


def test_decoding_is_prefill(path: Path) -> None:
    engine, ids = rqc.load(path, threads=1), prompt(10)
    tokens = engine.generate_ids(ids, max_new_tokens=40)
    again = engine.logits((ids + tokens)[:-1])[len(ids) - 1 :]
    assert np.argmax(again, axis=1).tolist() == tokens


def test_pieces_of_a_prompt_are_the_whole(path: Path) -> None:
    with EngineFile.open(path) as file:
        whole, chunked = (OrtBackend(file, threads=1, chunk=chunk) for chunk in (512, 7))
    ids = np.array(prompt(45))
    expected, found = (np.concatenate(list(backend.score(ids))) for backend in (whole, chunked))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_rows_of_a_batch_are_alone(path: Path) -> None:
    engine = rqc.load(path, threads=1)
    prompts = [prompt(length, seed=length) for length in (1, 9, 4, 30)]
    batch = engine.generate_ids(prompts, max_new_tokens=12)
    assert batch == [engine.generate_ids(ids, max_new_tokens=12) for ids in prompts]


def test_sizes_are_those_of_the_caches(path: Path) -> None:
    with EngineFile.open(path) as file:
        graph, said = file.manifest["graph"], str(file.manifest["kv_cache_grid"])
        backend = OrtBackend(file, threads=1)
        token = sum(slot.zeros(1, 1).nbytes for slot in backend._io.slots)
    whole = 2 * graph["layers"] * graph["kv_heads"] * graph["head_dim"]
    group = graph["head_dim"]  # no head here has more than one group
    extra = 0 if "kernel" in said else whole // group * 5
    assert graph["cache_bytes"] == token == whole // (2 if path.stem == "int4" else 1) + extra
    found = inspect_engine(path, context=100)
    assert graph["cache"] == "shared"
    assert found.memory()["kv_cache"] == 100 * token
    assert found.memory()["kv_cache_per_1000_tokens"] == 1000 * token
    assert found.to_json()["kv_cache"] == path.stem
    assert said in found.to_text()


def test_old_runtimes_do_not_compute_with_codes(path: Path) -> None:
    with EngineFile.open(path) as file:
        graph = file.graph()
    _refuse_coded_caches(graph, "1.31.1")
    with pytest.raises(TargetError, match=r"keeps keys and values as codes, which ONNX Runtime 1\.23\.2 may not"):
        _refuse_coded_caches(graph, "1.23.2")
