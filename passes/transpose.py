"""Float linears without a transposed copy of their weights."""

from __future__ import annotations

import onnx_ir as ir

from rqc.passes.base import Pass, insert_before, linears, replace_uses
from rqc.passes.pack import MICROSOFT


class TransposeInKernel(Pass):
    """x (Wᵀ) with W as stored = FusedMatMul(x, W, transB): the runtime makes no transposed copy, a tied table stays
    one."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for _, node in linears(model):
            weight = node.inputs[1]
            transpose = weight.producer() if weight is not None else None
            if node.op_type != "MatMul" or transpose is None or transpose.op_type != "Transpose":
                continue
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
            fused = ir.node(
                "FusedMatMul",
                [node.inputs[0], transpose.inputs[0]],
                attributes={"transB": 1},
                domain=MICROSOFT,
                name=f"{node.name}/FusedMatMul",
                metadata_props=dict(node.metadata_props),
            )
            old, new = node.outputs[0], fused.outputs[0]
            new.name, new.shape, new.type = f"{old.name}.fused", old.shape, old.type
            insert_before(node, [fused])
            replace_uses(old, new)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
