"""ONNX Runtime computes a TensorRT graph as it is written: codes stay packed, nothing is fused into integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from scatter_engine import Scatter, plan_graph, write_scatter

from rqc.runtime.backends import session as sessions
from rqc.runtime.engine import Engine

IDS = np.random.default_rng(3).integers(0, 320, 40)


def logits(graph: bytes, options: ort.SessionOptions) -> np.ndarray:
    options.log_severity_level = 4
    session = ort.InferenceSession(graph, options)
    feeds: dict[str, Any] = {"input_ids": IDS[None]}
    for arg in session.get_inputs()[1:]:
        cache = np.zeros((1, *arg.shape[1:]), np.float16) if len(arg.shape) == 4 else np.arange(len(IDS))[None]
        feeds[arg.name] = cache
    result: np.ndarray = session.run(["logits"], feeds)[0][0]
    return result


def exact(graph: bytes) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return logits(graph, options)


def drift(graph: bytes, options: ort.SessionOptions) -> float:
    wanted = exact(graph)
    return float(np.linalg.norm(logits(graph, options) - wanted) / np.linalg.norm(wanted))


def test_codes_stay_packed_and_activations_stay_floats(tmp_path: Path) -> None:
    graph = plan_graph(Scatter())
    assert drift(graph, ort.SessionOptions()) > 4e-3  # why this is needed
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    sessions.compute_as_written(options, graph)
    assert drift(graph, options) < 2e-3
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert Counter(node.op_type for node in nodes)["MatMulNBits"] == 2 * 6 + 1
    assert not any(node.op_type in ("DequantizeLinear", "MatMul") for node in nodes)
    levels = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert levels == {1}


def test_static_activations_stay_pairs(tmp_path: Path) -> None:
    graph = plan_graph(Scatter(static=True))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    sessions.compute_as_written(options, graph)
    assert drift(graph, options) == 0
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QuantizeLinear"] == kinds["MatMul"] == 2 * 6 + 1


@pytest.mark.parametrize("static", [False, True])
def test_an_engine_computes_as_written(tmp_path: Path, static: bool) -> None:
    made = Scatter(static=static)
    engine = Engine.load(write_scatter(tmp_path / "e.plan", made), threads=1, backend="onnxruntime")
    wanted = exact(plan_graph(made))
    assert np.linalg.norm(engine.logits(IDS) - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_caches_are_scattered_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime would warn at every step that copies a cache."""
    monkeypatch.setattr(sessions, "_FATAL_ONLY", 2)
    path = write_scatter(tmp_path / "e.plan", Scatter())
    with Engine.load(path, threads=1, backend="onnxruntime") as engine:
        engine.generate_ids([IDS, IDS[:3]], max_new_tokens=5)
    told = capfd.readouterr().err
    assert "TensorScatter" not in told
