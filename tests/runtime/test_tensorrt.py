"""The TensorRT backend computes what ONNX Runtime computes: chunks, rows, caches, replayed graphs; errors in words."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDevice, fake_trt
from scatter_engine import Scatter, plan_graph, write_scatter

from rqc.runtime.backends import choice, plan_choice
from rqc.runtime.engine import Engine
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError, TargetError

TOLERANCE = 1e-4  # absolute, on float32 logits of a few units: rows beside each other, sums in another order


def prompt(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 320, length).tolist()


class Fake:
    """The fake GPU and module of one test, and engines that run on them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, rtx: bool) -> None:
        self.folder, self.device, self.rtx = folder, FakeDevice(), rtx
        self.trt = fake_trt(self.device, rtx=rtx)
        chosen = partial(plan_choice.choose, importer=lambda _name: self.trt, find_device=lambda: self.device)
        patch.setattr(choice, "choose", chosen)

    def write(self, **changes: Any) -> Path:
        made = Scatter(**{"dtype": "fp32", "target": "tensorrt-rtx" if self.rtx else "tensorrt", **changes})
        path = self.folder / f"{abs(hash(made))}.plan"
        return path if path.exists() else write_scatter(path, made)

    def load(self, backend: str = "tensorrt", **changes: Any) -> Engine:
        return Engine.load(self.write(**changes), threads=1, backend=backend)

    def pair(self, **changes: Any) -> tuple[Engine, Engine]:
        """The same engine on the plan and on ONNX Runtime."""
        return self.load(**changes), self.load("onnxruntime", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(params=[True, False], ids=["rtx", "standard"])
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Fake]:
    """Checks in the end that nothing was left on the device."""
    made = Fake(folder, monkeypatch, request.param)
    yield made
    gc.collect()
    assert not made.device.live
    assert not made.device.graphs


@pytest.fixture
def rtx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(folder, monkeypatch, True)


def test_auto_takes_the_plan(fake: Fake) -> None:
    engine = fake.load("auto")
    assert (engine.backend, engine.fallback_reason, engine.context_length) == ("tensorrt", None, 64)
    assert (engine.vocab_size, engine.threads, engine.adapters) == (320, 1, ())
    other = fake.load("onnxruntime")
    assert (other.backend, other.fallback_reason, other.context_length) == ("onnxruntime", None, 256)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", TOLERANCE), ("fp16", 5e-2)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64])
def test_logits_in_chunks_are_those_of_onnx_runtime(rtx: Fake, dtype: str, tolerance: float, length: int) -> None:
    plan, onnx = rtx.pair(dtype=dtype)
    ids = prompt(length)
    np.testing.assert_allclose(plan.logits(ids), onnx.logits(ids), rtol=0, atol=tolerance)
    pieces = list(plan.iter_logits(ids))
    assert [len(piece) for piece in pieces] == [16] * (length // 16) + [length % 16] * (length % 16 > 0)


def test_a_batch_generates_what_each_prompt_does_alone(fake: Fake) -> None:
    plan, onnx = fake.pair()
    prompts = [prompt(length, seed=length) for length in (1, 9, 40, 4)]
    batch = plan.generate_ids(prompts, max_new_tokens=20)
    assert batch == onnx.generate_ids(prompts, max_new_tokens=20)
    assert batch == [plan.generate_ids(ids, max_new_tokens=20) for ids in prompts]


def test_more_rows_than_the_profile_run_in_slices(fake: Fake) -> None:
    plan, onnx = fake.pair()
    prompts = [prompt(length, seed=length) for length in range(1, 10)]
    assert plan.generate_ids(prompts, max_new_tokens=6) == onnx.generate_ids(prompts, max_new_tokens=6)


def test_rows_whose_caches_end_unaligned_run_one_by_one(fake: Fake) -> None:
    """2 heads x 63 tokens x 16 x 2 bytes are no multiple of 256."""
    plan, onnx = fake.pair(context=63, dtype="fp16")
    prompts = [prompt(length, seed=length) for length in (5, 20, 3)]
    rows, first = plan.model.start([np.array(ids) for ids in prompts])
    others, second = onnx.model.start([np.array(ids) for ids in prompts])
    np.testing.assert_allclose(first, second, rtol=0, atol=5e-2)
    tokens = np.array([4, 5, 6])
    np.testing.assert_allclose(rows.step(tokens), others.step(tokens), rtol=0, atol=5e-2)


@pytest.mark.parametrize("kept", [[2, 0], [1], [0, 1, 2], [2, 2]])
def test_keeping_rows_keeps_their_futures(fake: Fake, kept: list[int]) -> None:
    plan, onnx = fake.pair()
    prompts = [np.array(prompt(length)) for length in (30, 2, 11)]
    states = [engine.model.start(prompts)[0] for engine in (plan, onnx)]
    for rows in states:
        rows.step(np.array([3, 4, 5]))
        rows.keep(kept)
        assert rows.lengths.tolist() == [[31, 3, 12][row] for row in kept]
    for step in range(4):
        tokens = np.arange(len(kept)) + step
        found = [rows.step(tokens) for rows in states]
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=TOLERANCE)


def test_rows_have_adapters_of_their_own(fake: Fake) -> None:
    plan, onnx = fake.pair(adapters=2)
    prompts, names = [prompt(3), prompt(20), prompt(3)], ["a1", None, "a0"]
    options: dict[str, Any] = {"max_new_tokens": 12, "adapter": names}
    together = plan.generate_ids(prompts, **options)
    assert together == onnx.generate_ids(prompts, **options)
    assert together[0] != together[2]
    np.testing.assert_allclose(
        plan.logits(prompt(20), adapter="a1"), onnx.logits(prompt(20), adapter="a1"), rtol=0, atol=TOLERANCE
    )


def test_decoding_replays_a_captured_graph(fake: Fake) -> None:
    """Standard TensorRT: the second step captures, those after it replay. RTX does so itself, and is told to."""
    engine = fake.load()
    engine.generate_ids([prompt(5)] * 2, max_new_tokens=12)
    device, (prefill, decode) = fake.device, fake.trt.contexts
    assert (prefill.profile, decode.profile) == (0, 1)
    assert prefill.strategy is None
    assert decode.bound == 3 + 1 + 4 * 2  # nothing is bound again from step to step
    if fake.rtx:
        assert decode.strategy is fake.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert (device.captures, device.launches) == (0, 0)
    else:
        assert (device.captures, device.launches) == (1, 10)


@pytest.mark.parametrize("why", ["not capturable", "capture fails"])
def test_what_cannot_be_captured_is_queued(folder: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    fake = Fake(folder, monkeypatch, rtx=False)
    expected = fake.load("onnxruntime").generate_ids(prompt(5), max_new_tokens=9)
    if why == "not capturable":
        fake.trt.capturable = False
    else:
        monkeypatch.setattr(fake.device, "end_capture", partial(_failing_end, fake.device, fake.device.end_capture))
    assert fake.load().generate_ids(prompt(5), max_new_tokens=9) == expected
    assert fake.device.launches == 0
    assert fake.device.captures == (why == "capture fails")


def _failing_end(device: FakeDevice, end: Callable[[], int]) -> int:
    device.drop_graph(end())
    raise TargetError("the GPU failed (cudaStreamEndCapture)")


def test_two_generations_at_once_do_not_mix(fake: Fake) -> None:
    plan, onnx = fake.pair()
    starts = [np.array(prompt(7)), np.array(prompt(30))]
    states = [[engine.model.start([ids])[0] for ids in starts] for engine in (plan, onnx)]
    for step in range(12):
        for place in (0, 1) if step % 3 else (0, 0, 1):
            found = [rows[place].step(np.array([step])).copy() for rows in states]
            np.testing.assert_allclose(found[0], found[1], rtol=0, atol=TOLERANCE)


def test_the_context_is_the_plans(fake: Fake) -> None:
    engine = fake.load()
    assert len(engine.generate_ids(prompt(50), max_new_tokens=100)) == 14
    assert engine.last_finish_reason == "context"
    assert engine.generate_ids(prompt(64)) == []
    with pytest.raises(InputError, match="65 tokens, the context length is 64"):
        engine.generate_ids(prompt(65))
    rows, _ = engine.model.start([np.array(prompt(64))])
    with pytest.raises(InputError, match="the plan's context is 64"):
        rows.step(np.array([1]))


def test_a_closed_engine_says_so_and_gives_the_memory_back(fake: Fake) -> None:
    with fake.load() as engine:
        engine.generate_ids(prompt(3), max_new_tokens=5)
        assert fake.device.live
    with pytest.raises(InputError, match="closed"):
        engine.generate_ids([1])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("deserialize_cuda_engine", "does not load the plan"),
        ("create_runtime_config", "does not create a runtime configuration"),
        ("create_execution_context", "does not create an execution context"),
        ("set_optimization_profile_async", "does not take its optimization profile 0"),
    ],
)
def test_a_plan_that_does_not_load(rtx: Fake, call: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    rtx.trt.fails.add(call)
    words = rf"TensorRT-RTX {told} \(tiny\): Error Code 3: {call} broken for a test"
    with pytest.raises(TargetError, match=words) as error:
        rtx.load()
    assert "onnxruntime" in error.value.hint
    with caplog.at_level(logging.WARNING, "rqc.runtime"):
        engine = rtx.load("auto")
    assert engine.backend == "onnxruntime"
    assert told in str(engine.fallback_reason)
    assert [record.message for record in caplog.records] == [engine.fallback_reason]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("set_input_shape", "does not take input_ids of shape"),
        ("set_tensor_address", "does not bind input_ids"),
        ("execute_async_v3", "does not run"),
    ],
)
def test_a_step_that_fails(fake: Fake, call: str, told: str) -> None:
    engine = fake.load()
    rows, _ = engine.model.start([np.array(prompt(5))])
    fake.trt.fails.add(call)
    with pytest.raises(TargetError, match=f"{told}.*Error Code 3: {call}"):
        rows.step(np.array([1]))
    fake.trt.fails.clear()
    other, _ = fake.load("onnxruntime").model.start([np.array(prompt(5))])
    np.testing.assert_allclose(rows.step(np.array([1])), other.step(np.array([1])), rtol=0, atol=TOLERANCE)


def test_a_gpu_that_is_too_small(fake: Fake) -> None:
    engine = fake.load()
    fake.device.memory = 100_000
    with pytest.raises(ResourceError, match="memory"):
        engine.model.start([np.array(prompt(5))] * 100)
    gc.collect()
    assert fake.device.memory == 100_000


@pytest.mark.parametrize("where", ["position_ids", "past_key_values.1.key"])
def test_inputs_that_the_plan_wants_on_the_host(rtx: Fake, where: str) -> None:
    rtx.trt.fails.add(where)
    with pytest.raises(EngineFormatError, match=f"the plan tiny reads {where} on the host"):
        rtx.load()


def test_a_plan_of_another_graph(rtx: Fake, tmp_path: Path) -> None:
    made = Scatter(dtype="fp32")
    write_scatter(tmp_path / "e.plan", made, plan=plan_graph(Scatter(dtype="fp32", context=32)))
    with pytest.raises(EngineFormatError, match="the plan tiny has no caches of 64 tokens"):
        Engine.load(tmp_path / "e.plan")
