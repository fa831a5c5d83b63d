"""One execution context of a TensorRT plan: what is bound to it, and running it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rqc.runtime.backends.base import AnyArray, FloatArray
from rqc.runtime.backends.cuda import ALIGNMENT, Buffer, Device
from rqc.runtime.backends.graph_io import GraphIO
from rqc.runtime.errors import RqcError

PREFILL, DECODE = 0, 1
"""The optimization profiles of a plan."""
_Bindings = dict[str, tuple[int, tuple[int, ...]]]


class Checked(Protocol):
    """`result`, unless it is None or False; raises TargetError with what TensorRT logged."""

    def __call__(self, result: Any, what: str) -> Any: ...


class PlanCall:
    """An execution context on one profile, and buffers on the device for everything that is no cache.

    What is bound stays bound from call to call. From the second call with the same bindings on, decoding replays a
    captured graph: TensorRT-RTX captures by itself, for standard TensorRT it is done here, where the plan allows it.
    """

    def __init__(self, trt: Any, device: Device, engine: Any, io: GraphIO, profile: int, checked: Checked) -> None:
        self._device, self._io, self._checked = device, io, checked
        captures_itself = hasattr(trt, "CudaGraphStrategy")
        self._captures = profile == DECODE and not captures_itself
        self._context = _context(trt, engine, checked, whole_graph=profile == DECODE and captures_itself)
        checked(
            self._context.set_optimization_profile_async(profile, device.stream),
            f"take its optimization profile {profile}",
        )
        device.synchronize()
        self._buffers: dict[str, Buffer] = {}
        self._bound: _Bindings = {}
        self._warm = False  # run once since it was bound: what TensorRT puts off until then cannot be captured
        self._graph = _Graph(device)

    def run(
        self, feeds: Mapping[str, AnyArray], caches: Sequence[tuple[int, tuple[int, ...]]], positions: int
    ) -> FloatArray:
        """Run on feeds and on caches (address and shape of each slot); logits [rows, positions, vocab].

        Caches are updated in place. Feeds that the plan does not take are left out.
        """
        bindings: _Bindings = {}
        fed = [  # alive until the copies are done
            (name, np.ascontiguousarray(array, self._io.inputs[name]))
            for name, array in feeds.items()
            if self._io.takes(name)
        ]
        for name, array in fed:
            bindings[name] = (self._buffer(name, array.nbytes), array.shape)
            self._device.upload(bindings[name][0], array)
        logits = np.empty((len(feeds["input_ids"]), positions, self._io.vocab_size), np.float32)
        bindings["logits"] = (self._buffer("logits", logits.nbytes), logits.shape)
        for slot, cache in zip(self._io.slots, caches, strict=True):
            bindings[slot.past] = bindings[slot.present] = cache
        try:
            self._bind(bindings)
            self._queue()
            self._device.download(logits, bindings["logits"][0])
            self._device.synchronize()
        except BaseException:
            self._bound = {}
            with contextlib.suppress(RqcError):
                self._device.synchronize()
            raise
        return logits

    def _buffer(self, name: str, size: int) -> int:
        """The address of at least `size` bytes for a tensor, the same as long as they suffice."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            self._bound = {}  # a graph must not outlive what it writes to
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = Buffer(self._device, max(size, ALIGNMENT))
        return buffer.address

    def _bind(self, bindings: _Bindings) -> None:
        if bindings == self._bound:
            return
        self._graph.drop()
        self._bound, self._warm = {}, False
        for name, (address, shape) in bindings.items():
            if not (name == "logits" or name.startswith("present.")):
                self._checked(self._context.set_input_shape(name, shape), f"take {name} of shape {list(shape)}")
            self._checked(self._context.set_tensor_address(name, address), f"bind {name}")
        self._bound = bindings

    def _queue(self) -> None:
        if self._warm and self._captures and not self._graph.ready:
            self._captures = self._capture()
        if self._graph.ready:
            self._graph.launch()
            return
        self._checked(self._context.execute_async_v3(self._device.stream), "run")
        self._warm = True

    def _capture(self) -> bool:
        """Record one run; whether that could be done."""
        capturable = getattr(self._context, "is_stream_capturable", lambda _stream: True)
        if not capturable(self._device.stream):
            return False
        queued = False
        with contextlib.suppress(RqcError):
            self._device.begin_capture()
            try:
                queued = bool(self._context.execute_async_v3(self._device.stream))
            finally:
                self._graph.take(self._device.end_capture())
        if not queued:
            self._graph.drop()
        return self._graph.ready


class _Graph:
    """A captured graph, or none."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._handle: int | None = None

    @property
    def ready(self) -> bool:
        return self._handle is not None

    def take(self, handle: int) -> None:
        self._handle = handle

    def launch(self) -> None:
        if self._handle is not None:
            self._device.launch(self._handle)

    def drop(self) -> None:
        if self._handle is not None:
            self._device.drop_graph(self._handle)
        self._handle = None

    def __del__(self) -> None:
        self.drop()


def _context(trt: Any, engine: Any, checked: Checked, *, whole_graph: bool) -> Any:
    """An execution context with scratch memory for its own profile only.

    whole_graph: let TensorRT-RTX capture and replay; it needs no warm-up and no fixed addresses for that.
    """
    strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    what = "create an execution context"
    if not whole_graph:
        return checked(engine.create_execution_context(strategy), what)
    config = checked(engine.create_runtime_config(), "create a runtime configuration")
    config.set_execution_context_allocation_strategy(strategy)
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return checked(engine.create_execution_context(config), what)
