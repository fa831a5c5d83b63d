"""Merge a pooled adapter into zero points: codes and scales stay, what integers cannot hold runs on block sums."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.models.quantized import LazyQuantized, Update
from rqc.passes.base import OFFSET, SUMS, AdapterPass, constant, initializer
from rqc.passes.quantize import quantize_again
from rqc.passes.side_paths import F32, addressed, dequantize_of, join, lazy_of, product, side_tensor, updated
from rqc.runtime.errors import SchemeError


class MergeZeroPoints(AdapterPass):
    """z ← zr, y ← y + P_g(x) corrᵀ with zr the integer zero point nearest to z − D/s and corr = D + s (zr − z).

    For deltas ΔW that are constant inside every block, D [N, G]; sums P_g(x) are computed once for all that read x. A
    DoRA's rows are scaled by m / n besides: s ← s m/n, corr ← corr m/n. The function changes by ΔW, on purpose.
    Source: QA-LoRA (arXiv 2309.14717); the correction is the one of asymmetric integer kernels.
    """

    @property
    def detail(self) -> str:
        """How many linears."""
        return f"{len(self.deltas)} linears"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for name, node, delta in addressed(model, self.deltas):
            dequantize = dequantize_of(node)
            if dequantize is None:
                raise SchemeError(f"{name} is stored as floats, without zero points", hint="--merge fold")
            base = lazy_of(dequantize)
            update = Update(delta, pooled=True)
            if update in base.updates:
                continue
            merged = updated(name, base, update)
            quantize_again(model, dequantize, merged)
            correct(model, node, name, merged, offset_tensor(model, f"{name}.correction", merged))
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def correct(model: ir.Model, node: ir.Node, name: str, merged: LazyQuantized, factor: ir.Value) -> None:
    """y ← y + P_g(x) factor, factor [G, N], behind a linear whose weight is `merged`."""
    x = node.inputs[0]
    assert x is not None
    nodes, sums = _sums(model, x, name, merged)
    scope = f"{name.removesuffix('.weight')}/correction"
    correction = product(sums, factor, scope, OFFSET, name)
    join(node, [*nodes, correction], correction.outputs[0], scope)


def offset_tensor(model: ir.Model, name: str, merged: LazyQuantized) -> ir.Value:
    """corrᵀ [G, N] of a weight with moved zero points."""

    def value() -> F32:
        return np.asarray(merged.adapted().correction.T)

    return side_tensor(model, name, (merged.groups, merged.shape[0]), value, merged, merged)


def _sums(model: ir.Model, x: ir.Value, name: str, merged: LazyQuantized) -> tuple[list[ir.Node], ir.Value]:
    """P_g(x) [batch, sequence, G]: the sums that are there for this x and block, or nodes that compute them."""
    block, groups, width = merged.block, merged.groups, merged.shape[1]
    wanted = f"{x.name}.sums_{block}"
    for user, _ in x.uses():
        if SUMS in user.metadata_props:
            chain = _chain(user)
            if chain[-1].outputs[0].name == wanted:
                for node in chain:
                    node.metadata_props[SUMS] += f"+{name}"
                return [], chain[-1].outputs[0]
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        scope = f"{name.removesuffix('.weight')}/sums"
        node = ir.node(kind, list(inputs), attributes=attributes, name=f"{scope}/{kind}", metadata_props={SUMS: name})
        node.outputs[0].name, node.outputs[0].type = f"{wanted}.{kind}", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        return node.outputs[0]

    value = x
    if groups * block != width:  # the last block is filled with zeros, which add nothing
        value = op(
            "Pad", value, constant(model, f"rqc.pad.{groups * block - width}", [0] * 5 + [groups * block - width])
        )
    value = op("Reshape", value, constant(model, f"rqc.blocks.{groups}x{block}", [0, 0, groups, block]))
    last = initializer(model, "rqc.last_axis", np.asarray([-1], np.int64))
    value = op("ReduceSum", value, last, keepdims=0)
    value.name = wanted
    return nodes, value


def _chain(first: ir.Node) -> list[ir.Node]:
    """The nodes of block sums, from the one that reads x."""
    chain = [first]
    while chain[-1].op_type != "ReduceSum":
        ((follower, _),) = chain[-1].outputs[0].uses()
        chain.append(follower)
    return chain
