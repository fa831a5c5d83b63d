"""A cache of fixed size that is updated in place: TensorScatter in front of an Attention with one output."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.passes.attention import WINDOW
from rqc.passes.base import Pass, constant, initializer, sizes
from rqc.passes.build import Builder
from rqc.runtime.errors import TargetError

CAPACITY = "capacity"
"""The symbolic length of the cache, the same in past and present."""


class ScatterCache(Pass):
    """present = past with k (v) at the row's positions; y = Attention(q, present k, present v, mask).

    Slot j of a row holds position j, so a query at position p sees the slots j ≤ p, and p − j < window: what lies
    behind a row's length is masked. TensorRT takes no Attention with more outputs than one; it turns TensorScatter
    into its own in-place cache update.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Attention" and len(node.outputs) > 1]
        masks: dict[str, ir.Value] = {}
        first: ir.Value | None = None
        for node in nodes:
            if any(value is None for value in node.inputs[:6]) or len(node.inputs) > 6:
                raise TargetError(f"{node.name}: an Attention without a cache of its own", hint="use --target onnx")
            window = node.metadata_props.get(WINDOW, "")
            if first is None:
                first = first_position(model, node)
            if window not in masks:
                masks[window] = _mask(model, node, window)
            _split(model, node, masks[window], first)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _ints(model: ir.Model, name: str, values: list[int] | int) -> ir.Value:
    """A shared int64 constant."""
    return initializer(model, f"rqc.cache.{name}", np.asarray(values, np.int64))


def positions(model: ir.Model) -> ir.Value:
    """The input position_ids [batch, tokens]. Raises TargetError for a graph without it."""
    found = next((value for value in model.graph.inputs if value.name == "position_ids"), None)
    if found is None:
        raise TargetError(
            "the graph takes no position_ids, which tell where the cache is written", hint="--target onnx"
        )
    return found


def first_position(model: ir.Model, anchor: ir.Node) -> ir.Value:
    """The position of each row's first new token, int64 [batch]: where its slots are written."""
    build = Builder(anchor, "rqc/cache/first")
    return build.op("Gather", positions(model), _ints(model, "0", 0), axis=1, dtype=ir.DataType.INT64)


def _mask(model: ir.Model, anchor: ir.Node, window: str) -> ir.Value:
    """0 where a query sees a slot, the lowest float elsewhere: [batch, 1, sequence, capacity]."""
    build = Builder(anchor, f"rqc/cache/mask{window}")
    int64, boolean = ir.DataType.INT64, ir.DataType.BOOL
    position = build.op("Unsqueeze", positions(model), _ints(model, "axes", [1, 3]), dtype=int64)
    shape = build.op("Shape", anchor.inputs[4], start=2, end=3, dtype=int64)
    capacity = build.op("Squeeze", shape, dtype=int64)
    slots = build.op("Range", _ints(model, "0", 0), capacity, _ints(model, "1", 1), dtype=int64)
    distance = build.op("Sub", position, slots, dtype=int64)
    seen = build.op("GreaterOrEqual", distance, _ints(model, "0", 0), dtype=boolean)
    if window:
        near = build.op("Less", distance, _ints(model, f"window{window}", int(window)), dtype=boolean)
        seen = build.op("And", seen, near, dtype=boolean)
    zero = initializer(model, "rqc.cache.seen", np.float32(0))
    lowest = initializer(model, "rqc.cache.hidden", np.float32(np.finfo(np.float32).min))
    return build.op("Where", seen, zero, lowest)


def _split(model: ir.Model, node: ir.Node, mask: ir.Value, first: ir.Value) -> None:
    build = Builder(node, node.name or "Attention")
    query_heads, heads = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    size = sizes(node.inputs[4])[3]
    query = _apart(model, build, node.inputs[0], query_heads, size)
    caches = []
    for new, past, old in zip(node.inputs[1:3], node.inputs[4:6], node.outputs[1:3], strict=True):
        assert past is not None
        cache = build.op("TensorScatter", past, _apart(model, build, new, heads, size), first, axis=-2)
        _present(model, past, old, cache)
        caches.append(cache)
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() > 0:
        y = _capped(build, model, query, caches, mask, node)
    else:
        y = build.op("Attention", query, *caches, mask, scale=node.attributes["scale"].as_float(), is_causal=0)
    y = build.op("Transpose", y, perm=[0, 2, 1, 3])
    y = build.op("Reshape", y, constant(model, "rqc.flat", [0, 0, -1]))
    y.shape = node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(y)
    model.graph.remove(node, safe=True)


def _capped(
    build: Builder, model: ir.Model, query: ir.Value, caches: list[ir.Value], mask: ir.Value, node: ir.Node
) -> ir.Value:
    """softmax(c tanh(scale q kᵀ / c) + mask) v in small steps: TensorRT's Attention has no softcap.

    q as [batch, kv heads, heads per kv head, sequence, size], so that k and v are not repeated.
    """
    scale, cap = (node.attributes[name].as_float() for name in ("scale", "softcap"))
    all_heads, (_, heads, _, size) = node.attributes["q_num_heads"].as_int(), sizes(caches[0])
    parted = [0, heads, all_heads // heads, -1, size]
    axis = _ints(model, "axis2", [2])
    keys, values = (build.op("Unsqueeze", cache, axis) for cache in caches)
    groups = build.op("Reshape", query, _ints(model, f"{heads}x{all_heads // heads}x{size}", parted))
    scores = build.op("MatMul", groups, build.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    scores = build.op("Mul", scores, initializer(model, f"rqc.cache.scale{scale / cap:g}", np.float32(scale / cap)))
    scores = build.op("Mul", build.op("Tanh", scores), initializer(model, f"rqc.cache.cap{cap:g}", np.float32(cap)))
    scores = build.op("Add", scores, build.op("Unsqueeze", mask, axis))
    y = build.op("MatMul", build.op("Softmax", scores, axis=-1), values)
    return build.op("Reshape", y, _ints(model, f"whole{all_heads}x{size}", [0, all_heads, -1, size]))


def _apart(model: ir.Model, build: Builder, value: ir.Value | None, heads: int, size: int) -> ir.Value:
    """[batch, sequence, heads · size] as [batch, heads, sequence, size]."""
    parted = build.op("Reshape", value, _ints(model, f"{heads}x{size}", [0, 0, heads, size]))
    return build.op("Transpose", parted, perm=[0, 2, 1, 3])


def _present(model: ir.Model, past: ir.Value, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be the graph output that `old` was; past and present have one symbolic length."""
    batch, heads, _, size = past.shape or ir.Shape([None] * 4)
    past.shape = ir.Shape([batch, heads, CAPACITY, size])
    new.shape, new.type = past.shape, past.type
    outputs = list(model.graph.outputs)
    name = old.name
    old.name, new.name = f"{name}.before", name
    model.graph.outputs[outputs.index(old)] = new
