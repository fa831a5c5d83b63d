"""Fuse norm gains: RMSNorm(x; g) W^T = RMSNorm(x; 1) (W diag(g))^T."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.models.algebra import folded_norms, norm_folds
from rqc.models.description import HEAD, Description
from rqc.passes.base import Pass, set_weight, sizes, weight_of
from rqc.passes.ties import is_tied

DONE = "rqc.norms"


class FuseNormGains(Pass):
    """W ← W diag(g), g ← 1 for every norm whose output only claimed linears read (g = 1 + w, w ← 0 in Gemma).

    The final norm's gain moves into the head unless head and embedding are one table. eps and the norm itself stay.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if DONE in model.metadata_props:
            return ir.passes.PassResult(model, modified=False)
        initializers = model.graph.initializers
        head = HEAD in initializers and not is_tied(model)
        for name, folds in norm_folds(self.description, head=head).items():
            weight = weight_of(initializers[name])
            assert weight is not None
            set_weight(initializers[name], weight.folded(*folds))
        neutral = 0.0 if self.description.family.offset_norms else 1.0
        for name in folded_norms(self.description, head=head):
            value = initializers[name]
            size = sizes(value)
            value.const_value = ir.Tensor(np.full(size, neutral, np.float32), name=name)
        model.metadata_props[DONE] = "folded" if head else "folded but the final norm"
        return ir.passes.PassResult(model, modified=True)
