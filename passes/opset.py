"""Declare no newer opset than the graph needs."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from rqc.passes.base import Pass

OPSET, IR_VERSION = 23, 10


class StampOpset(Pass):
    """Declare the lowest opset and IR version that have these operators: runtimes for Python 3.10 read opset 23, not
    24.

    A node that uses what only opset 24 has (an input that its opset-23 schema lacks) keeps the graph at 24.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if model.graph.opset_imports[""] <= OPSET or not all(_known(node) for node in model.graph if not node.domain):
            return ir.passes.PassResult(model, modified=False)
        model.graph.opset_imports[""] = OPSET
        model.ir_version = IR_VERSION
        return ir.passes.PassResult(model, modified=True)


def _known(node: ir.Node) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return False
    return len(node.inputs) <= len(schema.inputs) or schema.max_input > len(schema.inputs)
