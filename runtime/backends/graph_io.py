"""What a decoder graph takes and gives: its inputs by role, and the key-value slots of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rqc.runtime.backends.base import AnyArray, FloatArray
from rqc.runtime.errors import EngineFormatError

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,  # numpy has none; such caches stay on a device
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
GATES = "adapter_gates"
"""The input [batch, adapters] of graphs whose adapters can be switched: how much each row adds of each, 1 or 0."""
_PLAIN_INPUTS = frozenset(
    {
        *("input_ids", "position_ids", "attention_mask", "seqlens_k", "total_sequence_length", "logits_positions"),
        GATES,
    }
)
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value|codes|scales|zeros)")


@dataclass(frozen=True)
class CacheSlot:
    """A part of one layer's cache, keys or values, or what they are made of: [rows, heads, length, dim] of `dtype`."""

    past: str
    present: str
    heads: int
    dim: int
    dtype: type[np.generic]

    def zeros(self, rows: int, length: int) -> AnyArray:
        """An empty cache; pages that are never written take no memory."""
        return np.zeros((rows, self.heads, length, self.dim), self.dtype)


@dataclass(frozen=True)
class GraphIO:
    """The interface of a decoder graph: plain inputs with their types, cache slots in layer order, and how many
    adapters it can switch."""

    inputs: Mapping[str, type[np.generic]]
    slots: tuple[CacheSlot, ...]
    vocab_size: int
    adapters: int = 0

    def takes(self, name: str) -> bool:
        """Whether the graph has this input; exporters leave out what a graph does not use."""
        return name in self.inputs

    def gates(self, gates: FloatArray | None, rows: int) -> FloatArray:
        """The gates [rows, adapters] as given; closed ones for None."""
        return np.zeros((rows, self.adapters), np.float32) if gates is None else gates


def read_graph_io(
    inputs: Sequence[Any], outputs: Sequence[Any], graph: Mapping[str, Any], what: str = "graph.onnx"
) -> GraphIO:
    """Match the inputs and outputs of a session (onnxruntime NodeArg) or a plan with the manifest's "graph" table.

    Shapes that the graph leaves open are taken from the manifest. Raises EngineFormatError for an input that the
    runtime does not know how to feed, a cache without its output and a missing `input_ids` or `logits`.
    """
    plain = {arg.name: _dtype(arg, what) for arg in inputs if arg.name in _PLAIN_INPUTS}
    results = {arg.name for arg in outputs}
    if "input_ids" not in plain or "logits" not in results:
        raise EngineFormatError(f"{what} has no input_ids or no logits: it is not a decoder that rqc can run")
    slots: list[tuple[int, str, CacheSlot]] = []
    for arg in inputs:
        if arg.name in plain:
            continue
        match = _PAST.fullmatch(arg.name)
        if match is None:
            raise EngineFormatError(
                f"{what} has the input {arg.name!r}, which this runtime cannot feed",
                hint="update rqc on this device",
            )
        slots.append((int(match[1]), match[2], _slot(arg, int(match[1]), match[2], results, graph, what)))
    slots.sort(key=lambda item: item[:2])
    widths = [arg.shape[-1] for arg in inputs if arg.name == GATES]
    if not all(isinstance(width, int) and width > 0 for width in widths):
        raise EngineFormatError(f"{what} does not state how many adapters {GATES} switches")
    return GraphIO(plain, tuple(slot for _, _, slot in slots), _vocab_size(outputs, graph, what), sum(widths))


def _slot(arg: Any, layer: int, kind: str, results: set[str], graph: Mapping[str, Any], what: str) -> CacheSlot:
    present = f"present.{layer}.{kind}"
    if present not in results:
        raise EngineFormatError(f"{what} reads {arg.name} but does not write {present}")
    heads, dim = arg.shape[1], arg.shape[3]
    return CacheSlot(
        past=arg.name,
        present=present,
        heads=heads if isinstance(heads, int) else _of_layer(graph, "kv_heads", layer),
        dim=dim if isinstance(dim, int) else _of_layer(graph, "head_dim", layer),
        dtype=_dtype(arg, what),
    )


def _of_layer(graph: Mapping[str, Any], key: str, layer: int) -> int:
    value = graph.get(key)
    if isinstance(value, list) and layer < len(value):
        value = value[layer]
    if not isinstance(value, int) or value < 1:
        raise EngineFormatError(f"the manifest's graph.{key} gives no size for layer {layer}")
    return value


def _vocab_size(outputs: Sequence[Any], graph: Mapping[str, Any], what: str) -> int:
    width = next(arg.shape[-1] for arg in outputs if arg.name == "logits")
    value = width if isinstance(width, int) else graph.get("vocab_size")
    if not isinstance(value, int) or value < 1:
        raise EngineFormatError(f"the manifest's graph.vocab_size is missing, and {what} does not state it")
    return value


def _dtype(arg: Any, what: str) -> type[np.generic]:
    try:
        return _DTYPES[arg.type]
    except KeyError:
        raise EngineFormatError(f"{what}: {arg.name} has the type {arg.type}, which rqc does not feed") from None
