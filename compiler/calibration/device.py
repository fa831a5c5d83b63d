"""Where calibration runs a model's blocks: on the CPU, or on a GPU through ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import onnxruntime as ort

from rqc.runtime.errors import ResourceError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_providers: ContextVar[tuple[str, ...]] = ContextVar("providers", default=(CPU,))


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Blocks that are opened inside run there. Raises ResourceError, before anything is run, where that cannot be."""
    if device == "cuda" and CUDA not in ort.get_available_providers():
        raise ResourceError(
            "--device cuda: this ONNX Runtime has no CUDA provider",
            hint="pip install onnxruntime-gpu in place of onnxruntime, or --device cpu",
        )
    before = _providers.set((CUDA, CPU) if device == "cuda" else (CPU,))
    try:
        yield
    finally:
        _providers.reset(before)


def open_session(model: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on a model file, on the device that is set; on a GPU, the CPU runs what has no kernel there.

    Raises ResourceError where ONNX Runtime has the provider but finds no GPU: it would go on without a word.
    """
    wanted = _providers.get()
    session = ort.InferenceSession(model, options, providers=list(wanted))
    if wanted[0] not in session.get_providers():
        raise ResourceError(
            "--device cuda: ONNX Runtime finds no GPU, or not the CUDA libraries that it was built for",
            hint="rqc doctor says what is there; --device cpu",
        )
    return session
