"""Remove what nothing reads."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from rqc.passes.base import Pass


class RemoveDeadParts(Pass):
    """Nodes, initializers and inputs that nothing reads go; token ids stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = common.RemoveUnusedNodesPass()(model).modified
        for value in list(model.graph.inputs):
            if not value.uses() and value.name != "input_ids":
                model.graph.inputs.remove(value)
                modified = True
        for name, value in list(model.graph.initializers.items()):
            if not value.uses():
                del model.graph.initializers[name]
                modified = True
        return ir.passes.PassResult(model, modified=modified)
