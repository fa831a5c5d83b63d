"""The TensorRT backend, standard and RTX: a plan deserialized, prompts read row by row, then all rows one token at a
time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rqc.runtime.backends.base import FloatArray, IntArray, Sequences
from rqc.runtime.backends.device_sequences import DeviceSequences
from rqc.runtime.backends.graph_io import GraphIO, read_graph_io
from rqc.runtime.backends.plan_call import DECODE, PREFILL, PlanCall
from rqc.runtime.backends.plan_choice import FLAVOURS, Chosen
from rqc.runtime.backends.session import checked_threads
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError, TargetError

_SCORE_BYTES = 64 << 20  # logits of one run of `score`
_KEPT_MESSAGES = 8
_BUILD = "build the plan again: rqc build ENGINE"
# TensorRT's names of types as ONNX Runtime has them, which `read_graph_io` reads
_TYPES = {
    "FLOAT": "tensor(float)",
    "HALF": "tensor(float16)",
    "BF16": "tensor(bfloat16)",
    "INT8": "tensor(int8)",
    "UINT8": "tensor(uint8)",
    "INT32": "tensor(int32)",
    "INT64": "tensor(int64)",
}


class TensorrtBackend:
    """A plan on a GPU. Sequences have caches of their own and take turns with the plan's two execution contexts."""

    def __init__(self, engine: EngineFile, chosen: Chosen, *, threads: int | None = None) -> None:
        """Raises TargetError, with TensorRT's own words, where the plan does not load on this GPU."""
        self._threads = checked_threads(threads)
        self._plan = chosen.plan
        self._device = chosen.device
        self._lock = threading.Lock()  # a context is for one thread at a time
        loaded = _Loaded(engine, chosen)
        self._io = loaded.io
        self._calls: tuple[PlanCall, PlanCall] | None = (loaded.call(PREFILL), loaded.call(DECODE))

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def vocab_size(self) -> int:
        return self._io.vocab_size

    @property
    def adapters(self) -> int:
        return self._io.adapters

    @property
    def context_length(self) -> int:
        return self._plan.context

    def start(self, prompts: Sequence[IntArray], gates: FloatArray | None = None) -> tuple[Sequences, FloatArray]:
        sequences = self._sequences(len(prompts), gates)
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        for row, ids in enumerate(prompts):
            for begin, end in self._pieces(len(ids), self._plan.prompt[2]):
                last = sequences.prefill(row, ids[begin:end], np.array([end - begin - 1], np.int64))
            logits[row] = last[0]
        return sequences, logits

    def score(self, ids: IntArray, gates: FloatArray | None = None) -> Iterator[FloatArray]:
        sequences = self._sequences(1, gates)
        chunk = min(self._plan.prompt[2], max(1, _SCORE_BYTES // (4 * self.vocab_size)))
        for begin, end in self._pieces(len(ids), chunk):
            yield sequences.prefill(0, ids[begin:end], np.arange(end - begin))

    def _sequences(self, rows: int, gates: FloatArray | None) -> DeviceSequences:
        if self._calls is None:
            raise InputError("this engine is closed", hint="load it again with rqc.load")
        return DeviceSequences(self._device, self._plan, self._io, self._calls, self._lock, rows, gates)

    @staticmethod
    def _pieces(length: int, chunk: int) -> Iterator[tuple[int, int]]:
        for begin in range(0, length, chunk):
            yield begin, min(begin + chunk, length)

    def close(self) -> None:
        """Drop the plan; the memory goes back when running sequences are dropped too."""
        self._calls = None


class _Loaded:
    """A deserialized plan and what it takes and gives."""

    def __init__(self, file: EngineFile, chosen: Chosen) -> None:
        self._trt, self._device, self._plan = chosen.module, chosen.device, chosen.plan
        self._logger = collecting_logger(self._trt)
        self._runtime = self.checked(self._trt.Runtime(self._logger), "create a runtime")
        data = file.read(self._plan.entry)
        self._engine = self.checked(self._runtime.deserialize_cuda_engine(data), "load the plan")
        if int(self._engine.num_optimization_profiles) <= DECODE:
            raise EngineFormatError(f"the plan {self._plan.name} has no profile for decoding", hint=_BUILD)
        self.io = self._read_io(file)

    def checked(self, result: Any, what: str) -> Any:
        """`result`, unless it is None or False. Raises TargetError with what TensorRT logged."""
        if result is None or result is False:
            flavour = FLAVOURS[self._plan.flavour][1]
            words = "; ".join(self._logger.take()) or "it does not say why"
            raise TargetError(
                f"{flavour} does not {what} ({self._plan.name}): {words}",
                hint="backend onnxruntime runs it on the CPU",
            )
        return result

    def call(self, profile: int) -> PlanCall:
        """An execution context on one of the profiles."""
        return PlanCall(self._trt, self._device, self._engine, self.io, profile, self.checked)

    def _read_io(self, file: EngineFile) -> GraphIO:
        """Raises EngineFormatError where the plan is not one of this engine's graph."""
        trt, engine, plan = self._trt, self._engine, self._plan
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        tensors = [_Tensor(trt, engine, name) for name in names]
        if elsewhere := [tensor.name for tensor in tensors if tensor.on_host]:
            raise EngineFormatError(f"the plan {plan.name} reads {', '.join(elsewhere)} on the host", hint=_BUILD)
        inputs = [tensor for tensor in tensors if tensor.is_input]
        outputs = [tensor for tensor in tensors if not tensor.is_input]
        io = read_graph_io(inputs, outputs, file.manifest.get("graph") or {}, what=f"the plan {plan.name}")
        shapes = {tensor.name: tensor.shape for tensor in inputs}
        if not io.slots or any(shapes[slot.past][2] != plan.context for slot in io.slots):
            raise EngineFormatError(f"the plan {plan.name} has no caches of {plan.context} tokens", hint=_BUILD)
        logits = next(tensor for tensor in outputs if tensor.name == "logits")
        if not io.takes("logits_positions") or logits.type != "tensor(float)":
            raise EngineFormatError(f"the plan {plan.name} gives no float32 logits at logits_positions", hint=_BUILD)
        return io


class _Tensor:
    """An input or output of a plan in the words of ONNX Runtime's NodeArg."""

    def __init__(self, trt: Any, engine: Any, name: str) -> None:
        self.name = name
        self.shape = [int(size) if size >= 0 else None for size in engine.get_tensor_shape(name)]
        kind = engine.get_tensor_dtype(name).name
        self.type = _TYPES.get(kind, kind)
        self.is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        self.on_host = engine.get_tensor_location(name) != trt.TensorLocation.DEVICE


def collecting_logger(trt: Any) -> Any:
    """An ILogger that keeps the last errors: TensorRT returns None or False and tells why to its logger alone."""

    class Collecting(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._messages.append(" ".join(str(message).split()))

        def take(self) -> list[str]:
            """The errors since the last call."""
            messages = list(self._messages)
            self._messages.clear()
            return messages

    return Collecting()
