"""Fuse a residual sum with the norm behind it."""

from __future__ import annotations

import onnx_ir as ir

from rqc.passes.base import Pass, insert_before, replace_uses
from rqc.passes.pack import MICROSOFT


class FuseSkipNorm(Pass):
    """s = a + b, RMSNorm(s; g) as one SkipSimplifiedLayerNormalization that returns both."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for norm in list(model.graph):
            source = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
            add = source.producer() if source is not None else None
            if add is None or add.op_type != "Add" or any(v is None or v.is_initializer() for v in add.inputs):
                continue
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
            fused = ir.node(
                "SkipSimplifiedLayerNormalization",
                [add.inputs[0], add.inputs[1], norm.inputs[1]],
                attributes={"epsilon": norm.attributes["epsilon"].as_float()},
                domain=MICROSOFT,
                num_outputs=4,
                name=f"{norm.name}/Skip",
            )
            for old, new in ((norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[3])):
                new.name, new.shape, new.type = f"{old.name}.fused", old.shape, old.type
            for unused in fused.outputs[1:3]:
                unused.name = ""
            insert_before(norm, [fused])
            replace_uses(add.outputs[0], fused.outputs[3], keep=[norm])
            replace_uses(norm.outputs[0], fused.outputs[0])
            model.graph.remove([norm, add], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
