"""An ONNX Runtime session on the weights inside an engine file, and the words for what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnxruntime as ort

from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError, RqcError

_FATAL_ONLY = 4  # ORT prints its own coloured line for an error that also comes back as an exception
_MAX_THREADS = 1024


def default_threads() -> int:
    """Physical cores that this process may run on: a second thread on a core gains nothing in a matrix product."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in usable}
    return max(1, len(cores))


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
    try:
        return ort.InferenceSession(engine.graph(), options, providers=["CPUExecutionProvider"])
    except RqcError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise _translated(error, "ONNX Runtime does not load this engine's graph") from error


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
