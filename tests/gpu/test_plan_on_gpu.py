"""A real plan on a real GPU: built here, run by the backend, held against ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scatter_engine import Scatter, write_scatter

from rqc.runtime.backends.cuda import ALIGNMENT, Buffer, Cuda, open_cuda
from rqc.runtime.backends.plan_choice import FLAVOURS
from rqc.runtime.engine import Engine

pytestmark = pytest.mark.gpu
PROFILE = "1:1:4/1:16:16/64"
TOLERANCE = 5e-2  # absolute, on fp16 logits of a few units


@pytest.fixture(scope="module")
def device() -> Cuda:
    found = open_cuda()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module", params=list(FLAVOURS))
def planned(
    device: Cuda, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """planned(**changes) → an engine with a plan of one flavour for this GPU."""
    flavour = request.param
    pytest.importorskip(FLAVOURS[flavour][0])
    from rqc.runtime.add_plan import add_plan

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(flavour)
        path = write_scatter(folder / "e.plan", Scatter(target=flavour, **changes), pending=True)
        sm = device.sm if flavour == "tensorrt-rtx" else None
        add_plan(path, target=flavour, sm=sm, profile=PROFILE)
        return path

    return make


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 320, length).tolist()


def test_memory_streams_and_graphs(device: Cuda) -> None:
    array, back = np.arange(1000, dtype=np.float32), np.empty(1000, np.float32)
    first, second = (Buffer(device, array.nbytes) for _ in range(2))
    assert first.address % ALIGNMENT == 0
    device.fill_zeros(second.address, second.size)
    device.upload(first.address, array)
    device.synchronize()
    device.begin_capture()
    device.copy(second.address, first.address, 2000)
    graph = device.end_capture()
    device.launch(graph)
    device.download(back, second.address)
    device.synchronize()
    device.drop_graph(graph)
    np.testing.assert_array_equal(back, np.where(np.arange(1000) < 500, array, 0))
    assert device.sm >= 50
    assert device.name


def test_the_plan_computes_what_onnx_runtime_computes(planned: Callable[..., Path]) -> None:
    path = planned()
    plan, onnx = (Engine.load(path, threads=1, backend=backend) for backend in ("tensorrt", "onnxruntime"))
    for length in (1, 16, 40, 64):
        np.testing.assert_allclose(plan.logits(prompt(length)), onnx.logits(prompt(length)), rtol=0, atol=TOLERANCE)
    prompts = [np.array(prompt(length)) for length in (30, 2, 11, 5, 7)]
    states = [engine.model.start(prompts)[0] for engine in (plan, onnx)]
    for step in range(8):
        found = [rows.step(np.arange(len(rows.lengths)) + step).copy() for rows in states]
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=TOLERANCE)
        if step == 3:
            for rows in states:
                rows.keep([3, 0])


def test_adapters_switch_on_the_plan(planned: Callable[..., Path]) -> None:
    path = planned(adapters=2)
    plan, onnx = (Engine.load(path, threads=1, backend=backend) for backend in ("tensorrt", "onnxruntime"))
    for name in (None, "a0", "a1"):
        found, wanted = (engine.logits(prompt(20), adapter=name) for engine in (plan, onnx))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
