"""Run any stage of the graph on given tokens with ONNX Runtime: what --verify-each, --dump-ir and the scores stand
on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from rqc.compiler.float4_on_cpu import look_up_float4
from rqc.compiler.lazy_errors import own_errors
from rqc.passes.scatter_cache import CAPACITY
from rqc.runtime.backends.graph_io import GATES
from rqc.runtime.replace_file import scratch_folder

Logits = NDArray[np.float32]
INLINE_LIMIT = 1024
CACHE_TYPES = {"tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


def save_stage(model: ir.Model, path: Path) -> None:
    """Write a stage as a runnable ONNX model, weights beside it in PATH.data; the stage keeps its lazy weights."""
    with own_errors():
        ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=INLINE_LIMIT)


def run_stage(model: ir.Model, token_ids: Sequence[int] | NDArray[np.int64], *, threads: int = 0) -> Logits:
    """Logits [sequence, vocab] of a stage for one sequence of token ids, in float32."""
    with scratch_folder("stage") as folder:
        path = Path(folder) / "stage.onnx"
        save_stage(model, path)
        let_look_up(model, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # TensorScatter warns that it copies
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # by default a product behind DequantizeLinear is fused, and rounds its activations to 8 bits
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return run_session(session, np.asarray(token_ids, np.int64))


def let_look_up(model: ir.Model, path: Path) -> None:
    """Let a saved stage look 4-bit floats up, if it has some."""
    if any(value.dtype == ir.DataType.FLOAT4E2M1 for value in model.graph.initializers.values()):
        stage = onnx.load(path, load_external_data=False)
        look_up_float4(stage)
        onnx.save(stage, path)


def run_session(session: ort.InferenceSession, token_ids: NDArray[np.int64]) -> Logits:
    """Logits [sequence, vocab] of one sequence, whichever of the contract's inputs the graph has."""
    (logits,) = session.run(["logits"], feeds(session, token_ids))
    return np.asarray(logits[0], np.float32)


def feeds(session: ort.InferenceSession, token_ids: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """Inputs for one whole sequence with an empty past; a cache of fixed size has just the slots for it."""
    fed = {}
    for item in session.get_inputs():
        known = {CAPACITY: len(token_ids)}
        shape = [size if isinstance(size, int) else known.get(size) for size in item.shape]
        value = feed(item.name, shape, token_ids[None])
        fed[item.name] = value.astype(CACHE_TYPES.get(item.type, value.dtype))
    return fed


def feed(name: str, shape: Sequence[int | None], token_ids: NDArray[np.int64]) -> NDArray[np.generic]:
    """The value of one graph input for whole sequences [batch, n] with an empty past, every adapter that can be
    switched switched on; `shape` is used for these, and for past keys and values."""
    batch, n = token_ids.shape
    positions = np.tile(np.arange(n, dtype=np.int64), (batch, 1))
    known: dict[str, NDArray[np.generic]] = {
        "input_ids": token_ids,
        "attention_mask": np.ones((batch, n), np.int64),
        "position_ids": positions,
        "logits_positions": positions,
        "seqlens_k": np.full(batch, n - 1, np.int32),
        "total_sequence_length": np.asarray(n, np.int32),
    }
    if name in known:
        return known[name]
    if name == GATES:
        return np.ones((batch, shape[1] or 0), np.float32)
    return np.zeros((batch, shape[1] or 0, shape[2] or 0, shape[3] or 0), np.float32)


def drift(before: Logits, after: Logits) -> float:
    """Relative drift ‖after − before‖ / ‖before‖ over all logits; infinite when anything is not finite."""
    if not np.isfinite(after).all():
        return float("inf")
    difference = float(np.linalg.norm((after - before).astype(np.float64)))
    return difference / max(float(np.linalg.norm(before.astype(np.float64))), 1e-30)
