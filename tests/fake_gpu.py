"""A GPU and a TensorRT module without either: queued work on host memory, plans that are ONNX graphs.

As strict as the real ones where a program can go wrong unnoticed: nothing happens before `synchronize`, new memory is
garbage, every address must be aligned and allocated, shapes must fit the profile, past and present must be one buffer.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from rqc.runtime.backends.cuda import ALIGNMENT
from rqc.runtime.errors import ResourceError, TargetError

Work = Callable[[], None]
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
_KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class FakeDevice:
    """rqc.runtime.backends.cuda.Device on host memory."""

    def __init__(self, sm: int = 86, memory: int = 1 << 30) -> None:
        self.sm, self.name, self.stream, self.memory = sm, "Fake 4090", 7, memory
        self.live: dict[int, tuple[int, Any]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.captures = self.launches = 0
        self._queue: list[Work] = []
        self._recording: list[Work] | None = None

    def malloc(self, size: int) -> int:
        if size > self.memory:
            raise ResourceError(f"the GPU's memory does not suffice for {size} bytes")
        self.memory -= size
        block = (ctypes.c_ubyte * (size + ALIGNMENT))()
        ctypes.memset(block, 0xFF, len(block))
        address = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        self.live[address] = (size, block)
        return address

    def free(self, address: int) -> None:
        size, block = self.live.pop(address)
        ctypes.memset(block, 0xFF, len(block))
        self.memory += size

    def check(self, address: int, size: int) -> None:
        """Fail unless these bytes are allocated."""
        assert any(start <= address and address + size <= start + held for start, (held, _) in self.live.items())

    def queue(self, work: Work) -> None:
        (self._queue if self._recording is None else self._recording).append(work)

    def fill_zeros(self, address: int, size: int) -> None:
        self.check(address, size)
        self.queue(lambda: void(ctypes.memset(address, 0, size)))

    def upload(self, address: int, array: Any) -> None:
        self._copy_array(array, address, to_device=True)

    def download(self, array: Any, address: int) -> None:
        self._copy_array(array, address, to_device=False)

    def _copy_array(self, array: Any, address: int, *, to_device: bool) -> None:
        assert array.flags.c_contiguous
        self.check(address, array.nbytes)
        alive, host, size = weakref.ref(array), array.ctypes.data, array.nbytes

        def work() -> None:
            assert alive() is not None, "the array is gone before its copy"
            ctypes.memmove(*((address, host) if to_device else (host, address)), size)

        self.queue(work)

    def copy(self, to: int, source: int, size: int) -> None:
        self.check(to, size)
        self.check(source, size)
        self.queue(lambda: void(ctypes.memmove(to, source, size)))

    def synchronize(self) -> None:
        assert self._recording is None
        while self._queue:
            self._queue.pop(0)()

    def begin_capture(self) -> None:
        self.captures += 1
        self._recording = []

    def end_capture(self) -> int:
        recorded, self._recording = self._recording, None
        if not recorded:
            raise TargetError("the GPU failed (cudaStreamEndCapture)")
        self.graphs[self.captures] = recorded
        return self.captures

    def launch(self, graph: int) -> None:
        self.launches += 1
        self._queue.extend(self.graphs[graph])

    def drop_graph(self, graph: int) -> None:
        del self.graphs[graph]


def void(_result: object) -> None:
    """For lambdas that call for an effect."""


class _Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING = range(3)


class _Logger:
    Severity = _Severity


def fake_trt(device: FakeDevice, *, rtx: bool = True, version: str = "1.7.1.116") -> Any:
    """A module `tensorrt_rtx` (or `tensorrt`). Calls named in its set `fails` return None or False and log why."""
    trt = SimpleNamespace(__version__=version, ILogger=_Logger, device=device, fails=set(), contexts=[], executions=0)
    trt.capturable = True
    trt.TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    trt.TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
    trt.DataType = enum.Enum("DataType", "FLOAT HALF INT64")
    trt.ExecutionContextAllocationStrategy = enum.Enum("Strategy", "STATIC ON_PROFILE_CHANGE")
    trt.Runtime = lambda logger: _Runtime(trt, logger)
    if rtx:
        trt.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
    return trt


class _Failing:
    """What is told to the logger, and to it alone."""

    def __init__(self, trt: Any, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def fails(self, call: str, bad: bool = False, why: str = "broken for a test") -> bool:
        if not bad and call not in self.trt.fails:
            return False
        self.logger.log(_Severity.WARNING, "a warning that nobody wants to see")
        self.logger.log(_Severity.ERROR, f"Error Code 3: {call}\n{why}")
        return True


class _Runtime(_Failing):
    def deserialize_cuda_engine(self, data: bytes) -> Any:
        if self.fails("deserialize_cuda_engine"):
            return None
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return _Engine(self.trt, self.logger, ort.InferenceSession(data, options))


class _Engine(_Failing):
    num_optimization_profiles = 2

    def __init__(self, trt: Any, logger: Any, session: Any) -> None:
        super().__init__(trt, logger)
        self.session = session
        self.inputs = {arg.name: arg for arg in session.get_inputs()}
        self.tensors = self.inputs | {arg.name: arg for arg in session.get_outputs()}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.HOST if name in self.trt.fails else self.trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType[_KINDS[self.tensors[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def create_runtime_config(self) -> Any:
        if self.fails("create_runtime_config"):
            return None
        config = SimpleNamespace(cuda_graph_strategy=None, strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, given: Any) -> Any:
        if self.fails("create_execution_context"):
            return None
        assert getattr(given, "strategy", given) is self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = _Context(self.trt, self.logger, self, getattr(given, "cuda_graph_strategy", None))
        self.trt.contexts.append(context)
        return context


class _Context(_Failing):
    batch, prompt = 4, 16  # the profile's largest

    def __init__(self, trt: Any, logger: Any, engine: _Engine, strategy: Any) -> None:
        super().__init__(trt, logger)
        self.engine, self.strategy = engine, strategy
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.bound = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.trt.device.stream
        self.profile = profile
        return not self.fails("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.get_tensor_shape(name)
        fixed = len(shape) == len(declared) and all(a in (-1, b) for a, b in zip(declared, shape, strict=True))
        longest = self.prompt if self.profile == 0 else 1
        inside = 1 <= shape[0] <= self.batch and (name == "adapter_gates" or len(shape) > 2 or 1 <= shape[1] <= longest)
        if self.fails("set_input_shape", not (fixed and inside), f"{name} {shape} in profile {self.profile}"):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound += 1
        self.addresses[name] = address
        return not self.fails("set_tensor_address", address % ALIGNMENT != 0, f"{name} is not aligned")

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == self.trt.device.stream
        return bool(self.trt.capturable)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.trt.device.stream
        self.trt.executions += 1
        shapes = self.shapes | dict(self._outputs())
        if self.fails("execute_async_v3", set(self.addresses) != set(self.engine.tensors), "not all is bound"):
            return False
        arrays = {name: self._array(name, address, shapes[name]) for name, address in self.addresses.items()}
        for name in arrays:
            if name.startswith("past_key_values."):
                assert self.addresses[name] == self.addresses[name.replace("past_key_values", "present")]
        self.trt.device.queue(lambda: self._run(arrays))
        return True

    def _outputs(self) -> list[tuple[str, tuple[int, ...]]]:
        rows = self.shapes["input_ids"][0]
        vocab = self.engine.tensors["logits"].shape[2]
        caches = [(name.replace("past_key_values", "present"), shape) for name, shape in self.shapes.items()]
        return [("logits", (*self.shapes["logits_positions"], vocab)), *caches] if rows else []

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_NUMPY[self.engine.get_tensor_dtype(name).name])
        size = dtype.itemsize * int(np.prod(shape))
        self.trt.device.check(address, size)
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)

    def _run(self, arrays: dict[str, Any]) -> None:
        session = self.engine.session
        feeds = {name: np.array(arrays[name]) for name in self.engine.inputs}
        names = [arg.name for arg in session.get_outputs()]
        for name, result in zip(names, session.run(names, feeds), strict=True):
            arrays[name][...] = result
