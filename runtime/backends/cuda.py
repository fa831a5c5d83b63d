"""The part of the CUDA runtime library that a plan needs, by ctypes: memory, copies, one stream, captured graphs."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rqc.runtime.backends.base import AnyArray
from rqc.runtime.errors import ResourceError, RqcError, TargetError

ALIGNMENT = 256
"""Bytes on which TensorRT wants every tensor to begin; cudaMalloc's own alignment."""
_MAJORS = (13, 12, 11)
_NONE = {35: "no CUDA driver, or one older than the CUDA library", 100: "no CUDA device"}
_OUT_OF_MEMORY, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 2, 75, 76
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
_PROPERTIES = 1 << 14  # bytes, far more than any version's cudaDeviceProp, which begins with the name
_NAME = 256


class Device(Protocol):
    """One GPU and one stream: what is queued happens in order, and is done after `synchronize`.

    Every call raises ResourceError where memory is short, TargetError for any other failure.
    """

    @property
    def stream(self) -> int:
        """The stream's handle."""

    @property
    def sm(self) -> int:
        """The compute capability as NVIDIA numbers it, such as 86."""

    @property
    def name(self) -> str:
        """The GPU's name."""

    def malloc(self, size: int) -> int:
        """The address of `size` new bytes, aligned to ALIGNMENT."""

    def free(self, address: int) -> None:
        """Give memory back; never raises."""

    def fill_zeros(self, address: int, size: int) -> None:
        """Queue zeros."""

    def upload(self, address: int, array: AnyArray) -> None:
        """Queue a copy of a contiguous array, which must live until `synchronize`."""

    def download(self, array: AnyArray, address: int) -> None:
        """Queue a copy into a contiguous array."""

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue a copy on the device."""

    def synchronize(self) -> None:
        """Wait for everything that was queued."""

    def begin_capture(self) -> None:
        """Record what is queued from here on instead of doing it."""

    def end_capture(self) -> int:
        """The recorded graph, ready to launch."""

    def launch(self, graph: int) -> None:
        """Queue a recorded graph."""

    def drop_graph(self, graph: int) -> None:
        """Give a recorded graph back; never raises."""


class Buffer:
    """Memory on the device that goes back with the object."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.address = device.malloc(size)
        self.free = weakref.finalize(self, device.free, self.address)
        """Give it back now."""


class Cuda:
    """The calling thread's current device (the first of CUDA_VISIBLE_DEVICES) through libcudart."""

    def __init__(self, library: Any) -> None:
        """library: a loaded libcudart that `open_cuda` found a device with."""
        self._library = library
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self._stream = stream
        weakref.finalize(self, library.cudaStreamDestroy, stream)

    @property
    def stream(self) -> int:
        return self._stream.value or 0

    @property
    def sm(self) -> int:
        return 10 * self._attribute(_CAPABILITY_MAJOR) + self._attribute(_CAPABILITY_MINOR)

    @property
    def name(self) -> str:
        properties = ctypes.create_string_buffer(_PROPERTIES)
        self._call("cudaGetDeviceProperties", properties, ctypes.c_int(0))
        return properties.raw[:_NAME].split(b"\0", 1)[0].decode(errors="replace")

    def malloc(self, size: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size), what=f"{size} bytes")
        return address.value or 0

    def free(self, address: int) -> None:
        self._library.cudaFree(ctypes.c_void_p(address))

    def fill_zeros(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", ctypes.c_void_p(address), ctypes.c_int(0), ctypes.c_size_t(size), self._stream)

    def upload(self, address: int, array: AnyArray) -> None:
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def download(self, array: AnyArray, address: int) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)

    def copy(self, to: int, source: int, size: int) -> None:
        self._copy(to, source, size, _ON_DEVICE)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        self._call("cudaStreamBeginCapture", self._stream, ctypes.c_int(_THREAD_LOCAL))

    def end_capture(self) -> int:
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            # cudaGraphInstantiate has another signature in CUDA 11
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cudaGraphDestroy(graph)
        return ready.value or 0

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), self._stream)

    def drop_graph(self, graph: int) -> None:
        self._library.cudaGraphExecDestroy(ctypes.c_void_p(graph))

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), ctypes.c_int(0))
        return value.value

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        places = (ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size))
        self._call("cudaMemcpyAsync", *places, ctypes.c_int(kind), self._stream)

    def _call(self, function: str, *arguments: Any, what: str = "") -> None:
        status = int(getattr(self._library, function)(*arguments))
        if status:
            self._library.cudaGetLastError()  # or the next call would report it once more
            raise _failure(self._library, function, status, what)


def open_cuda(library: Any = None) -> Cuda | str:
    """The first device, or in a few words why there is none. library: a loaded libcudart, for tests."""
    library = library or _load()
    if library is None:
        return "no CUDA runtime library (libcudart)"
    count = ctypes.c_int()
    status = int(library.cudaGetDeviceCount(ctypes.byref(count)))
    if status:
        library.cudaGetLastError()
    if status:
        return _NONE.get(status, f"no CUDA device ({_words(library, status)})")
    if not count.value:
        return "no CUDA device"
    try:
        return Cuda(library)
    except RqcError as error:
        return f"no usable CUDA device ({error.message})"


def _load() -> Any:
    """libcudart from the loader's paths or from NVIDIA's Python packages; None if there is none."""
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _candidates() -> Iterator[str]:
    if sys.platform == "win32":
        yield from (f"cudart64_{major}.dll" for major in _MAJORS)
        return
    yield from (f"libcudart.so.{major}" for major in _MAJORS)
    yield "libcudart.so"
    for folder in sys.path:  # pip install nvidia-cuda-runtime puts it beside the other packages
        for found in sorted(Path(folder or ".").glob("nvidia/*/lib/libcudart.so.*"), reverse=True):
            yield str(found)


def _failure(library: Any, function: str, status: int, what: str) -> RqcError:
    words = f"{function}: {_words(library, status)}"
    if status == _OUT_OF_MEMORY:
        return ResourceError(
            f"the GPU's memory does not suffice for {what or 'this step'} ({words})",
            hint="use fewer prompts at once, or a plan with a shorter context",
        )
    return TargetError(f"the GPU failed ({words})", hint="backend onnxruntime runs it on the CPU")


def _words(library: Any, status: int) -> str:
    """What the library says of a status."""
    library.cudaGetErrorString.restype = ctypes.c_char_p
    text = library.cudaGetErrorString(ctypes.c_int(status)) or b""
    return f"{text.decode(errors='replace') or 'no words'}, status {status}"
