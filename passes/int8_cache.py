"""Keys and values kept in 8 bits, by the attention's own kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.passes.base import Pass, initializer, sizes
from rqc.passes.cache_ranges import KEY_RANGE, VALUE_RANGE, ranges

LIMIT = 127
PAST, SCALES = 3, 12
"""Places of the past keys and of their scales among the inputs of GroupQueryAttention; the values' come next."""


class Int8Cache(Pass):
    """k ← s clamp(round(k / s), −128, 127) with s = range / 127, one static scale per kv head and channel; v alike.

    GroupQueryAttention stores the codes and computes with what they stand for, for the tokens of the same run too.
    """

    exact = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fused = (node for node in model.graph if node.op_type == "GroupQueryAttention")
        nodes = [node for node in fused if KEY_RANGE in node.metadata_props]
        for node in nodes:
            self._quantize(model, node)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _quantize(self, model: ir.Model, node: ir.Node) -> None:
        node.resize_inputs(SCALES + 2)
        for offset, mark in enumerate((KEY_RANGE, VALUE_RANGE)):
            past, present = node.inputs[PAST + offset], node.outputs[1 + offset]
            assert past is not None
            _, heads, _, size = sizes(past)
            scales = (ranges(node.metadata_props.pop(mark)) / LIMIT).astype(np.float32)
            shaped = np.broadcast_to(scales, heads * size).reshape(1, heads, 1, size)
            value = initializer(model, f"{past.name}.scale", shaped)
            node.replace_input_with(SCALES + offset, value)
            past.type = present.type = ir.TensorType(ir.DataType.INT8)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
