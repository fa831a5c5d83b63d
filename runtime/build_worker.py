"""The process that builds a TensorRT plan: `build.py` starts it in a directory of its own, with nothing of rqc in it.

It reads job.json and graph.onnx (whose weights lie in engine.plan beside it), writes plan.bin, counts its steps in the
two integers of the file progress, and ends with a line of JSON: {"version": …} or {"error": reason}.

A process of its own, because a builder that crashes must not take the compiler along, and because equal graphs give
equal plans only in equal processes: TensorRT-RTX 1.7 orders the caches in a plan by where it holds them in memory. So
this one imports nothing but the builder, its addresses are not randomized, and it tells of progress without allocating.
"""

import ctypes
import importlib
import json
import mmap
import os
import sys
from typing import Any

ADDR_NO_RANDOMIZE = 0x0040000
PR_SET_PDEATHSIG, SIGKILL = 1, 9


def main() -> None:
    _fix_addresses()
    _die_with_parent()
    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    with open("graph.onnx", "rb") as file:
        graph = file.read()
    trt = importlib.import_module(job["module"])
    result: dict[str, str] = {"version": str(trt.__version__)}
    try:
        plan = Build(trt, job).run(graph)
        with open("plan.bin", "wb") as out:
            out.write(memoryview(plan))
    except Refused as error:
        result = {"error": str(error)}
    print(json.dumps(result), flush=True)


def _fix_addresses() -> None:
    """Start again without address space randomization, where the system allows it."""
    personality = getattr(ctypes.CDLL(None), "personality", None)
    if personality is None:
        return
    current = personality(0xFFFFFFFF)
    if current != -1 and not current & ADDR_NO_RANDOMIZE and personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _die_with_parent() -> None:
    """A compile that is killed takes its builder along."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, SIGKILL)


class Refused(Exception):
    """What the builder says against a graph."""


class Build:
    """One build: every call that can fail is checked, and what TensorRT logged is told; that is its only channel."""

    def __init__(self, trt: Any, job: dict[str, Any]) -> None:
        self.trt, self.job = trt, job
        self.logger = _logger(trt)

    def run(self, graph: bytes) -> Any:
        """The serialized plan, in memory of the builder's."""
        trt = self.trt
        builder = self._made(trt.Builder(self.logger))
        builder.max_threads = 1
        network = self._made(builder.create_network(_network_flags(trt)))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(graph, "graph.onnx"):
            raise Refused(f"its parser refuses {_parser_errors(parser)}")
        _let_attention_decompose(trt, network)
        config = self._made(builder.create_builder_config())
        if self.job["sms"]:
            config.num_compute_capabilities = len(self.job["sms"])
            for index, sm in enumerate(self.job["sms"]):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
        for shapes in self.job["profiles"]:
            config.add_optimization_profile(self._profile(builder, network, shapes))
        if os.path.exists("progress"):
            config.progress_monitor = _monitor(trt)
        return self._made(builder.build_serialized_network(network, config))

    def _profile(self, builder: Any, network: Any, shapes: dict[str, list[int]]) -> Any:
        """Ranges for every input with open dimensions: the first is the batch, the second what `shapes` says of it."""
        made = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = list(tensor.shape)
            if -1 not in sizes:
                continue
            wanted = shapes.get(tensor.name, [])
            if sizes.count(-1) > 2 or (-1 in sizes[1:] and not wanted):
                raise Refused(f"the profile gives no range for input {tensor.name} {sizes}")
            ranges = []
            for which in range(3):
                filled = [shapes["batch"][which], *sizes[1:]]
                ranges.append(tuple(wanted[which] if size == -1 else size for size in filled))
            made.set_shape(tensor.name, *ranges)
        return made

    def _made(self, value: Any) -> Any:
        if value is None:
            raise Refused("; ".join(self.logger.errors[-3:]) or "it gave no reason")
        return value


def _network_flags(trt: Any) -> int:
    """Strongly typed; in TensorRT-RTX and from TensorRT 11 on there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Where no kernel has a head's size or type, build an Attention from smaller steps; by default it may not."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding hands out the base class
            layer.attention.decomposable = True


def _parser_errors(parser: Any) -> str:
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} {error.node_name()} ({error.desc()})" for error in found[:3])


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _monitor(trt: Any) -> Any:
    with open("progress", "r+b") as file:
        counts = (ctypes.c_int * 2).from_buffer(mmap.mmap(file.fileno(), 8))

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Steps of the outermost phases; what runs inside them is too quick to tell."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.totals[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if total := self.totals.get(phase_name):
                counts[0], counts[1] = step + 1, total
            return True

    return Monitor()


if __name__ == "__main__":
    main()
