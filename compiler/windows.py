"""Sliding windows of attention: which layer has which, and the mask where the importer dropped it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rqc.models.description import Architecture
from rqc.passes.base import initializer, insert_after
from rqc.runtime.errors import UnsupportedModelError

WINDOW = "rqc.window"
"""Mark on an Attention node: how many positions back a query sees, itself included."""


def layer_windows(config: dict[str, Any], architecture: Architecture) -> list[int | None]:
    """The window of each layer as transformers applies it, None where attention reaches the whole past."""
    window = config.get("sliding_window")  # transformers clears it where use_sliding_window is off and heeded
    if not window:
        return [None] * architecture.layers
    types = config.get("layer_types")
    if types:
        return [int(window) if kind == "sliding_attention" else None for kind in types]
    return [int(window)] * architecture.layers


def add_sliding_windows(model: ir.Model, config: dict[str, Any], architecture: Architecture) -> None:
    """Mark every Attention node with its window and give every layer the mask that transformers gives it.

    The importer builds a model whose layers all slide (Mistral, Phi-3) with full attention, and Gemma 2 with its
    windows on the wrong layers. Masks that already hold a window are replaced wherever the graph has a full one to
    start from.
    """
    windows = layer_windows(config, architecture)
    if not any(windows):
        return
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    full = next((mask for node in attentions if (mask := node.inputs[3]) is not None and not _has_window(mask)), None)
    if full is None:
        raise UnsupportedModelError(
            f"{architecture.model_type}: the importer gave no layer a full mask", hint="rqc cannot prove this window"
        )
    banded: dict[int, ir.Value] = {}
    for node, window in zip(attentions, windows, strict=True):
        if window is None:
            node.replace_input_with(3, full)
            continue
        node.metadata_props[WINDOW] = str(window)
        if window not in banded:
            banded[window] = _band(model, full, window)
        node.replace_input_with(3, banded[window])


def _has_window(mask: ir.Value) -> bool:
    """Whether a comparison of distances (Less) went into a mask."""
    seen: set[ir.Node] = set()
    waiting = [mask.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.op_type == "Less":
            return True
        seen.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return False


def _band(model: ir.Model, mask: ir.Value, window: int) -> ir.Value:
    """mask ∧ (query position − key position < window), key positions counted over the valid tokens."""
    inputs = {value.name: value for value in model.graph.inputs}
    one, axis1, axis2 = (
        initializer(model, f"rqc.window.{name}", np.asarray(value, np.int64))
        for name, value in (("one", 1), ("axis1", [1]), ("axis2", [2]))
    )
    limit = initializer(model, f"rqc.window.{window}", np.asarray(window, np.int64))
    nodes: list[ir.Node] = []

    def op(kind: str, *args: ir.Value) -> ir.Value:
        nodes.append(ir.node(kind, list(args), name=f"rqc/window{window}/{kind}_{len(nodes)}"))
        nodes[-1].outputs[0].name = f"rqc.window{window}.{len(nodes)}"
        return nodes[-1].outputs[0]

    keys = op("Sub", op("CumSum", inputs["attention_mask"], one), one)
    distance = op("Sub", op("Unsqueeze", inputs["position_ids"], axis2), op("Unsqueeze", keys, axis1))
    near = op("Unsqueeze", op("Less", distance, limit), axis1)
    if mask.dtype == ir.DataType.BOOL:
        out = op("And", mask, near)
    else:
        lowest = initializer(model, "rqc.window.lowest", np.asarray(np.finfo(np.float32).min, np.float32))
        out = op("Where", near, mask, lowest)
    producer = mask.producer()
    assert producer is not None
    insert_after(producer, nodes)
    return out
