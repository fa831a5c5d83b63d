"""An ONNX Runtime session on the weights inside an engine file, and the words for what it refuses."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import onnxruntime as ort

from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError, RqcError, TargetError

_FATAL_ONLY = 4  # ORT prints its own coloured line for an error that also comes back as an exception
_MAX_THREADS = 1024
# A serialized attribute local_window_size above 0: its name (field 1), then its value (field 3) as a short varint.
_WINDOW = re.compile(rb"\x0a\x11local_window_size\x18(?!\x00)[\x80-\xff]{0,8}[\x00-\x7f]")
_EXACT_WINDOWS = (1, 31)
# What a graph has that keeps its cache as codes: an attribute of its attentions, or caches of that name.
_CODED_CACHE, _CODED_CACHES = re.compile(rb"\x0a\x12kv_cache_bit_width|past_key_values\.0\.codes"), (1, 31)
# The op_type of a node (field 4) that is QuantizeLinear: an activation is rounded to a grid.
_QUANTIZED_ACTIVATION = b"\x22\x0eQuantizeLinear"


def default_threads() -> int:
    """Physical cores that this process may use: a second thread on a core gains nothing in a matrix product.

    In a container with a processor quota no more than the quota: threads beyond it stop each other.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota(Path("/sys/fs/cgroup/cpu.max"))))


def _quota(limits: Path) -> int:
    """Whole processors that a cgroup (version 2) grants in its cpu.max, "max" or microseconds, then the period."""
    words = limits.read_text(encoding="ascii").split() if limits.is_file() else []
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return _MAX_THREADS
    return max(1, int(words[0]) // max(1, int(words[1])))


def _siblings(cpu: int) -> str:
    """The hardware threads that share this one's core, as Linux lists them; elsewhere each counts as a core."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text(encoding="ascii").strip() if path.is_file() else str(cpu)


def checked_threads(threads: int | None) -> int:
    """The thread count to use. Raises InputError for one that is no count."""
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads is {threads!r}", hint=f"threads is a whole number from 1 to {_MAX_THREADS}")
    return threads


def open_session(engine: EngineFile, threads: int, *, spin: bool = True) -> ort.InferenceSession:
    """A CPU session whose weights ONNX Runtime maps from the engine file itself.

    spin: let idle workers wait actively; quicker on a quiet machine, costly on a shared one.
    Raises EngineFormatError (or ResourceError) with ONNX Runtime's reason.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", engine.directory)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    graph = engine.graph()
    if engine.manifest.get("target", "onnx") != "onnx":
        compute_as_written(options, graph)
    if engine.manifest.get("weights") == "fp8":
        _write_out(options)
    _refuse_inexact_windows(graph, ort.__version__)
    _refuse_coded_caches(graph, ort.__version__)
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except RqcError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise _translated(error, "ONNX Runtime does not load this engine's graph") from error


def compute_as_written(options: ort.SessionOptions, graph: bytes) -> None:
    """Keep ONNX Runtime from fusing quantized products of a TensorRT engine's graph into integer kernels.

    By default it runs 4-bit DequantizeLinear and MatMul as MatMulNBits with activations rounded to int8. By trial
    (1.31.1, fp16; llama-like, 4 layers of 1024, int4 in groups of 128; relative drift of the logits from
    ORT_ENABLE_BASIC, and a step on one thread of a busy machine): default 2.4e-2, 44 ms; accuracy level 1, float
    products on packed 4-bit weights, 1.0e-3, 120 ms; ORT_ENABLE_BASIC, which writes out every weight for every step,
    0, 640 ms. Level 1 it is; ORT_ENABLE_BASIC where activations are quantized too, which no level keeps apart.
    """
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if _QUANTIZED_ACTIVATION in graph:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def _write_out(options: ort.SessionOptions) -> None:
    """Let ONNX Runtime read 8-bit floats back once, when it loads them, not in every step.

    By trial (1.31.1, SmolLM2-135M, one thread): a step takes 0.04 s instead of 1.0 s, the process holds 0.97 GB instead
    of 0.73 GB and more with every step.
    """
    options.add_session_config_entry("session.disable_quant_qdq", "1")


def _refuse_inexact_windows(graph: bytes, version: str) -> None:
    """Raise TargetError for sliding windows on an ONNX Runtime that computes something else, without a word.

    By trial: GroupQueryAttention of 1.23.2 on a CPU looks one token further back than local_window_size, 1.31.1 does
    not; those between were not tried. Python 3.10 gets no newer one than 1.23.2.
    """
    installed = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if installed < _EXACT_WINDOWS and _WINDOW.search(graph):
        raise TargetError(
            f"this engine has sliding-window attention, which ONNX Runtime {version} computes differently",
            hint="install onnxruntime 1.31 or later (Python 3.11 or later)",
        )


def _refuse_coded_caches(graph: bytes, version: str) -> None:
    """Raise TargetError for a cache of codes on an ONNX Runtime that is not known to have such."""
    installed = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if installed < _CODED_CACHES and _CODED_CACHE.search(graph):
        raise TargetError(
            f"this engine keeps keys and values as codes, which ONNX Runtime {version} may not do",
            hint="install onnxruntime 1.31 or later (Python 3.11 or later), or compile with --kv-cache float",
        )


def run_bound(session: ort.InferenceSession, binding: Any) -> None:
    """Run with bound inputs and outputs. Raises EngineFormatError or ResourceError with ONNX Runtime's reason."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise _translated(error, "ONNX Runtime stopped in this engine's graph") from error


def _translated(error: Exception, what: str) -> RqcError:
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "bad_alloc" in reason or "Failed to allocate memory" in reason:
        return ResourceError(f"out of memory: {reason}", hint="use a shorter context or a smaller batch")
    return EngineFormatError(
        f"{what}: {reason}", hint="check the file with `rqc inspect ENGINE --check` and the versions with `rqc doctor`"
    )
