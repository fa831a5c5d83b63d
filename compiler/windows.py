"""Sliding windows of attention: which layer has which, and the mask where the importer dropped it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rqc.models.description import Architecture
from rqc.passes.base import initializer, insert_before

WINDOW = "rqc.window"
"""Mark on an Attention node: how many positions back a query sees, itself included."""


def layer_windows(config: dict[str, Any], architecture: Architecture) -> list[int | None]:
    """The window of each layer as transformers applies it, None where attention reaches the whole past."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return [None] * architecture.layers
    types = config.get("layer_types")
    if types:
        return [int(window) if kind == "sliding_attention" else None for kind in types]
    return [int(window)] * architecture.layers


def add_sliding_windows(model: ir.Model, config: dict[str, Any], architecture: Architecture) -> None:
    """Mark every Attention node with its window, and put windows into masks that lack them.

    The importer gives families of mixed layers (Gemma 2/3) their windowed masks but builds a model whose layers all slide
    (Mistral, Phi-3) with full attention.
    """
    windows = layer_windows(config, architecture)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    masked = architecture.model_type in ("gemma2", "gemma3_text")
    banded: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, window in zip(attentions, windows, strict=True):
        if window is None:
            continue
        node.metadata_props[WINDOW] = str(window)
        mask = node.inputs[3]
        if masked or mask is None or window >= architecture.context_length:
            continue
        if (mask, window) not in banded:
            banded[mask, window] = _band(model, node, mask, window)
        node.replace_input_with(3, banded[mask, window])


def _band(model: ir.Model, anchor: ir.Node, mask: ir.Value, window: int) -> ir.Value:
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
    insert_before(anchor, nodes)
    return out
