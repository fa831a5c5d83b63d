"""Rotate: fold R1, R2, R4 into the weights and put in their online halves, in one step."""

from __future__ import annotations

import json

import onnx_ir as ir

from rqc.models.algebra import dimensions, rotation_folds
from rqc.models.description import EMBEDDING, FINAL_NORM, Description
from rqc.models.families import FFN
from rqc.models.rotation import Orthogonal, Rotation
from rqc.passes.base import Pass, insert_after, insert_before, linears, replace_uses, set_weight, weight_of
from rqc.passes.online import OnlineRotation
from rqc.passes.ties import is_tied
from rqc.runtime.errors import RotationError

DONE = "rqc.rotation"


class Rotate(Pass):
    """x ↦ x R1 on the residual stream, v ↦ v R2 per head, q, k ↦ q R3, k R3 after RoPE, h ↦ h R4 before down_proj.

    W ← W Q where a linear reads a rotated space, W ← Qᵀ W where it writes one; R3 and R4 run online, and so does R1 at
    the two ends of the stream when embedding and head are one table. R4's random signs ride on up_proj's rows.
    """

    def __init__(self, description: Description, rotation: Rotation) -> None:
        super().__init__()
        self.description = description
        self.rotation = rotation

    @property
    def detail(self) -> str:
        """Sites, and how their matrices are made."""
        return f"{self.rotation} {self.rotation.made}"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if DONE in model.metadata_props or not self.rotation.sites:
            return ir.passes.PassResult(model, modified=False)
        if "r1" in self.rotation.sites and "rqc.norms" not in model.metadata_props:
            raise RotationError(
                "r1 before the norm gains are folded changes the function", hint="run FuseNormGains first"
            )
        tied = is_tied(model)
        for name, folds in rotation_folds(self.description, self.rotation, ends=not tied).items():
            value = model.graph.initializers[name]
            weight = weight_of(value)
            assert weight is not None
            set_weight(value, weight.folded(*folds))
            self._fold_bias(model, name)
        self._online(model, tied)
        basis = self.rotation.basis(dimensions(self.description))
        model.metadata_props[DONE] = json.dumps({**self.rotation.to_json(), "basis": basis}, sort_keys=True)
        return ir.passes.PassResult(model, modified=True)

    def _fold_bias(self, model: ir.Model, name: str) -> None:
        claim = self.description.by_weight.get(name)
        bias = model.graph.initializers.get(claim.bias) if claim is not None else None
        weight, folded = weight_of(bias), weight_of(model.graph.initializers[name])
        if bias is not None and weight is not None and folded is not None:
            set_weight(bias, weight.folded(*folded.folds[len(weight.folds) :]))

    def _online(self, model: ir.Model, tied: bool) -> None:
        a = self.description.architecture
        r1, r3 = self.rotation.r1(a.hidden_size), self.rotation.r3(a.head_dim)
        if r1 is not None and tied:
            _rotate_ends(model, r1)
        for node in list(model.graph):
            if r3 is not None and node.op_type == "Attention":
                for index, heads in ((0, a.heads), (1, a.kv_heads)):
                    _rotate_input(model, node, index, r3.with_repeat(heads), "r3")
        if "r4" in self.rotation.sites:
            for name, node in linears(model):
                claim = self.description.by_weight.get(name)
                if claim is not None and claim.linear.reads == FFN:
                    r4 = self.rotation.r4(self.description.sizes(claim.expert)[FFN])
                    assert r4 is not None
                    _rotate_input(model, node, 0, r4, "r4")


def _rotate_input(model: ir.Model, node: ir.Node, index: int, rotation: Orthogonal, site: str) -> None:
    source = node.inputs[index]
    assert source is not None
    online = OnlineRotation(model, rotation, site)
    rotated = online.build(source, f"{node.name}/input_{index}")
    insert_before(node, online.nodes)
    node.replace_input_with(index, rotated)


def _rotate_ends(model: ir.Model, r1: Orthogonal) -> None:
    """R1 online: x ← x R1 behind the embedding, x ← x R1ᵀ before the final norm; the one table stays as it is."""
    gather = next(
        node for node in model.graph if node.op_type == "Gather" and EMBEDDING in (v.name for v in node.inputs if v)
    )
    online = OnlineRotation(model, r1, "r1")
    embedded = gather.outputs[0]
    rotated = online.build(embedded, gather.name or "embed")
    insert_after(gather, online.nodes)
    replace_uses(embedded, rotated, keep=online.nodes)
    norm = final_norm(model)
    back = OnlineRotation(model, r1, "r1", inverse=True)
    source = norm.inputs[0]
    assert source is not None
    norm.replace_input_with(0, back.build(source, norm.name or "norm"))
    insert_before(norm, back.nodes)


def final_norm(model: ir.Model) -> ir.Node:
    """The norm before the head, found by its weight (which an Add of 1 may stand before)."""
    weight = model.graph.initializers[FINAL_NORM]
    for user, _ in weight.uses():
        if user.op_type == "RMSNormalization":
            return user
        for inner, _ in user.outputs[0].uses():
            if inner.op_type == "RMSNormalization":
                return inner
    raise RotationError("the graph has no final norm")
