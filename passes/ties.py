"""Tied embeddings: one table for the gather and the head, kept one or split in two."""

from __future__ import annotations

import onnx_ir as ir

from rqc.models.description import EMBEDDING, HEAD
from rqc.passes.base import Pass, set_weight, weight_of

UNTIED = "rqc.untied"


def is_tied(model: ir.Model) -> bool:
    """Whether gather and head read the same table: one tensor of the checkpoint, not untied by a pass."""
    if UNTIED in model.metadata_props:
        return False
    head = model.graph.initializers.get(HEAD)
    if head is None:
        return True
    embedding_weight, head_weight = weight_of(model.graph.initializers[EMBEDDING]), weight_of(head)
    return embedding_weight is not None and head_weight is not None and embedding_weight.name == head_weight.name


class Untie(Pass):
    """E_head ← a copy of E, so that folds may change the two ends apart (R1 and the final gain; costs vocab × hidden
    weights)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not is_tied(model):
            return ir.passes.PassResult(model, modified=False)
        initializers = model.graph.initializers
        embedding = initializers[EMBEDDING]
        weight = weight_of(embedding)
        assert weight is not None
        if HEAD not in initializers:
            head = ir.Value(name=HEAD, shape=embedding.shape, type=embedding.type)
            set_weight(head, weight)
            model.graph.register_initializer(head)
            for user, index in list(embedding.uses()):
                if user.op_type == "Transpose":
                    user.replace_input_with(index, head)
        model.metadata_props[UNTIED] = "true"
        return ir.passes.PassResult(model, modified=True)
