"""Let the kernel round activations to int8."""

from __future__ import annotations

import onnx_ir as ir

from rqc.passes.base import Pass

ACCURACY_INT8 = 4


class Int8Accumulation(Pass):
    """x ← round(x / s) s with s = absmax/127 per token and block of the weight: MatMulNBits' own int8 kernel
    (accuracy_level 4)."""

    exact = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type == "MatMulNBits" and node.attributes["accuracy_level"].as_int() != ACCURACY_INT8:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", ACCURACY_INT8)
                modified = True
        return ir.passes.PassResult(model, modified=modified)
