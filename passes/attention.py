"""Fuse attention for ONNX Runtime: Attention (+ RotaryEmbedding) become GroupQueryAttention, where its kernel computes
the same."""

from __future__ import annotations

import onnx_ir as ir

from rqc.passes.base import Pass, insert_before, replace_uses, sizes
from rqc.passes.pack import MICROSOFT

WINDOW = "rqc.window"


class FuseGroupQueryAttention(Pass):
    """softmax(c q kᵀ + mask) v over a cache in shared buffers, causal, with window, softcap and RoPE inside.

    All layers or none: the engine has one kind of cache. The kernel takes head sizes that are a multiple of 8 (of 16
    with RoPE inside), whole-head RoPE and lengths instead of masks (right padding); anything else stays on the standard
    Attention operator. RoPE stays outside where R3 stands between it and the attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Attention"]
        if not nodes or not all(_fits(node) for node in nodes):
            return ir.passes.PassResult(model, modified=False)
        model.graph.opset_imports.setdefault(MICROSOFT, 1)
        lengths = _length_inputs(model)
        for node in nodes:
            _fuse(model, node, lengths)
        return ir.passes.PassResult(model, modified=True)


def head_dim(node: ir.Node) -> int:
    """Elements per head, read off the past key [batch, kv heads, past, head_dim]."""
    return sizes(node.inputs[4])[3]


def _fits(node: ir.Node) -> bool:
    return head_dim(node) % 8 == 0 and all(value is not None for value in node.inputs[:6])


def _length_inputs(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    lengths = ir.Value(name="seqlens_k", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32))
    total = ir.Value(name="total_sequence_length", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    model.graph.inputs.extend([lengths, total])
    return lengths, total


def _fuse(model: ir.Model, node: ir.Node, lengths: tuple[ir.Value, ir.Value]) -> None:
    query, key, value, _, past_key, past_value = node.inputs[:6]
    attributes: dict[str, int | float] = {
        "num_heads": node.attributes["q_num_heads"].as_int(),
        "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
        "scale": node.attributes["scale"].as_float(),
    }
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() > 0:
        attributes["softcap"] = softcap.as_float()
    if WINDOW in node.metadata_props:
        attributes["local_window_size"] = int(node.metadata_props[WINDOW])
    tables: list[ir.Value] = []
    rope = _rope_inside(query, key, head_dim(node))
    if rope is not None:
        (query, key), tables = rope
        attributes |= {"do_rotary": 1, "rotary_interleaved": 0}
    packed = _packed(query, key, value)
    if packed is not None and (rope is not None or not _rotary(node)):
        query, key, value = packed, None, None
    fused = ir.node(
        "GroupQueryAttention",
        [query, key, value, past_key, past_value, *lengths, *tables],
        attributes=attributes,
        domain=MICROSOFT,
        num_outputs=3,
        name=(node.name or "").replace("Attention", "GroupQueryAttention"),
        metadata_props=dict(node.metadata_props),
    )
    insert_before(node, [fused])
    for old, new in zip(node.outputs, fused.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}.fused", old.shape, old.type
        replace_uses(old, new)
    model.graph.remove(node, safe=True)


def _rotary(node: ir.Node) -> bool:
    """Whether q still passes a RotaryEmbedding of its own before the attention."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer is not None and producer.op_type == "RotaryEmbedding"


def _rope_inside(
    query: ir.Value | None, key: ir.Value | None, size: int
) -> tuple[tuple[ir.Value | None, ir.Value | None], list[ir.Value]] | None:
    """Unrotated q and k and their cos and sin tables, if the kernel can do this RoPE; None if it must stay outside."""
    ropes = [value.producer() if value is not None else None for value in (query, key)]
    if size % 16 or any(rope is None or rope.op_type != "RotaryEmbedding" for rope in ropes):
        return None
    first, second = ropes
    assert first is not None
    assert second is not None
    tables = [_table(value) for value in first.inputs[1:3]]
    partial = [rope.attributes.get("rotary_embedding_dim") for rope in (first, second)]
    interleaved = [rope.attributes.get("interleaved") for rope in (first, second)]
    if (
        any(table is None for table in tables)
        or list(first.inputs[1:3]) != list(second.inputs[1:3])
        or any(attribute is not None and attribute.as_int() not in (0, size) for attribute in partial)
        or any(attribute is not None and attribute.as_int() for attribute in interleaved)
    ):
        return None
    found = [table for table in tables if table is not None]
    if any(sizes(table)[1:] != (size // 2,) for table in found):
        return None
    return (first.inputs[0], second.inputs[0]), found


def _table(value: ir.Value | None) -> ir.Value | None:
    """The whole cos or sin table behind its Gather, if that is by the position itself, as the kernel looks it up."""
    producer = value.producer() if value is not None else None
    index = producer.inputs[1] if producer is not None and producer.op_type == "Gather" else None
    if producer is None or index is None or index.name != "position_ids" or not index.is_graph_input():
        return None
    table = producer.inputs[0]
    return table if table is not None and table.is_initializer() else None


def _packed(query: ir.Value | None, key: ir.Value | None, value: ir.Value | None) -> ir.Value | None:
    """The packed projection, if q, k and v are exactly its three parts in order."""
    producers = {part.producer() for part in (query, key, value) if part is not None}
    split = producers.pop() if len(producers) == 1 else None
    if split is None or split.op_type != "Split" or list(split.outputs) != [query, key, value]:
        return None
    return split.inputs[0]
