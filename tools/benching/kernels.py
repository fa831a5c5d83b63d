"""Choices between kernels of ONNX Runtime, each decided by one command: the head (--head) and w8a8 (--w8a8)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benching import machine, report
from benching.kernel_graphs import Linear, Quantized, Variant, quantized
from benching.rounds import Round, Sample, figure, interleaved, ratio, steady

SMOLLM2 = (("qkv", 960, 576), ("o", 576, 576), ("gate_up", 3072, 576), ("down", 576, 1536))
LLAMA_1B = (("qkv", 3072, 2048), ("o", 2048, 2048), ("gate_up", 11264, 2048), ("down", 2048, 5632))
"""Name, N, K of the linears of one layer."""
HEADS = (("SmolLM2's head", 49152, 576, 64), ("the head of a 1B shape", 49152, 2048, 32))
"""Name, N, K and block: 64 is the largest that divides 576."""
HEAD_VARIANTS = ("8 bits, level 0", "8 bits, level 4", "nibble planes, level 0", "float FusedMatMul")
W8A8_VARIANTS = ("MatMulNBits 32", "MatMulNBits 128", "DynamicQuantizeMatMul")
_TURN_S = 0.05  # a measurement repeats a kernel for about that long
_CACHE_BYTES = 128 << 20  # more weights than any cache here holds, as in a model


@dataclass(frozen=True)
class Question:
    """How often to ask: rounds of a run, threads, the spread that a run may have, and how many runs at most."""

    rounds: int
    threads: int
    spread: float
    runs: int


class Timed:
    """A variant's session on one input, bound once. Its threads stop spinning when a run ends."""

    def __init__(self, variant: Variant, x: Mapping[str, NDArray[np.float32]], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(variant.model(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        for name, value in x.items():
            self._binding.bind_cpu_input(name, value)
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name, "cpu")
        self.results()
        begin = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self._repeats = max(1, round(_TURN_S / (time.perf_counter() - begin)))

    def results(self) -> list[NDArray[np.float32]]:
        """The outputs of one run."""
        self._session.run_with_iobinding(self._binding)
        found: list[NDArray[np.float32]] = self._binding.copy_outputs_to_cpu()
        return found

    def measure(self) -> Sample:
        """Milliseconds of one run, by the clock and of CPU time."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self._repeats):
            self._session.run_with_iobinding(self._binding)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"ms": 1e3 * wall / self._repeats, "cpu_ms": 1e3 * cpu / self._repeats}


def head(ask: Question) -> tuple[str, dict[str, Any]]:
    """An 8-bit head at both accuracy levels, as nibble planes and in float: what SplitNibbles is for."""
    parts, values = [], []
    for name, n, k, block in HEADS:
        table = quantized(n, k, block, seed=0)
        variants = {
            HEAD_VARIANTS[0]: lambda t=table: Variant.blocks([t], level=0),
            HEAD_VARIANTS[1]: lambda t=table: Variant.blocks([t], level=4),
            HEAD_VARIANTS[2]: lambda t=table: Variant.planes(t),
            HEAD_VARIANTS[3]: lambda t=table: Variant.floats([t]),
        }
        for rows in (1, 16):
            value = _compare(f"{name}, {n} × {k}, {rows} row{'s' * (rows > 1)}", ask, [table], variants, rows)
            parts.append(_text(value, ask, HEAD_VARIANTS[2]))
            values.append(value)
    return _report(parts), {"machine": machine.describe(), "head": values}


def w8a8(ask: Question) -> tuple[str, dict[str, Any]]:
    """The linears of enough layers to leave the cache, in the two forms that 8 × 8 bits can have on this runtime."""
    parts, values = [], []
    for name, shapes in (("SmolLM2", SMOLLM2), ("a 1B shape", LLAMA_1B)):
        layers = -(-_CACHE_BYTES // sum(n * k for _, n, k in shapes))
        linears = [Linear(n, k, seed) for seed in range(layers) for _, n, k in shapes]
        variants = {
            W8A8_VARIANTS[0]: lambda made=linears: Variant.blocks([one.blocks(32) for one in made], level=4),
            W8A8_VARIANTS[1]: lambda made=linears: Variant.blocks([one.blocks(128) for one in made], level=4),
            W8A8_VARIANTS[2]: lambda made=linears: Variant.dynamic(made),
        }
        for rows in (1, 512):
            title = f"{name}, the linears of {layers} layers, {rows} row{'s' * (rows > 1)}"
            value = _compare(title, ask, linears, variants, rows)
            parts.append(_text(value, ask, W8A8_VARIANTS[0]))
            values.append(value)
    return _report(parts), {"machine": machine.describe(), "w8a8": values}


def _compare(
    title: str,
    ask: Question,
    linears: list[Linear] | list[Quantized],
    variants: Mapping[str, Callable[[], Variant]],
    rows: int,
) -> dict[str, Any]:
    """Time all variants on the same input; the error is against the float product, first linear only."""
    x = _inputs({one.k for one in linears}, rows)
    timed = {name: Timed(make(), x, ask.threads) for name, make in variants.items()}
    exact = x[f"x{linears[0].k}"] @ linears[0].weight.T
    errors = {name: _error(one.results()[0], exact) for name, one in timed.items()}
    loads = [machine.load_average()]
    rounds, spreads = steady(
        lambda: interleaved(list(timed), ask.rounds, lambda name: timed[name].measure(), lambda _: None),
        ("ms",),
        limit=ask.spread,
        runs=ask.runs,
    )
    loads.append(machine.load_average())
    print(f"{title}: done", file=sys.stderr)
    return {
        "title": title,
        "rounds": rounds,
        "errors": errors,
        "spreads": spreads,
        "load_average": loads,
        "ms": {name: figure(rounds, name, "ms").to_json() for name in timed},
    }


def _inputs(widths: set[int], rows: int) -> dict[str, NDArray[np.float32]]:
    """Gaussian rows; of several the first is 30 times the others, as the first token's are in trained models."""
    generator = np.random.default_rng(1)
    found = {f"x{k}": generator.standard_normal((rows, k), np.float32) for k in sorted(widths)}
    if rows > 1:
        for value in found.values():
            value[0] *= 30
    return found


def _error(result: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """The median over rows of the relative L2 error."""
    distance = np.linalg.norm(result - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    return float(np.median(distance))


def _text(value: Mapping[str, Any], ask: Question, peer: str) -> str:
    rounds: list[Round] = value["rounds"]
    lines = [
        [
            name,
            report.quartiles(figure(rounds, name, "ms"), 2),
            report.quartiles(figure(rounds, name, "cpu_ms"), 2),
            report.quartiles(ratio(rounds, name, peer, "ms"), 2),
            f"{error:.1e}",
        ]
        for name, error in value["errors"].items()
    ]
    head_line = ["", "ms", "ms of CPU time", f"time / {peer}", "error"]
    loads = " to ".join(f"{load:.1f}" for load in value["load_average"])
    steadiness = report.steadiness(value["spreads"], ask.spread)
    size = f"{ask.threads} threads, {ask.rounds} rounds"
    return f"## {value['title']}, {size}\n\n{report.table(head_line, lines)}\n\n{steadiness} Load average {loads}."


def _report(parts: list[str]) -> str:
    legend = (
        "Median [quartiles] over rounds; ratios within rounds. The error is the median over rows of the relative L2 "
        "error against the float product of the same weights; of several rows the first is 30 times the others."
    )
    return "\n\n".join([*parts, legend, report.machine_lines(machine.describe(), {})])
