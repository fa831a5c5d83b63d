"""Pack projections: q, k, v (and gate, up) read the same x, so one MatMulNBits on the stacked rows computes all of
them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.models.description import Description
from rqc.models.quantized import LazyQuantized
from rqc.passes.base import (
    CLIP,
    LINEAR,
    Pass,
    discard,
    initializer,
    insert_before,
    lazy_initializer,
    linears,
    replace_uses,
)
from rqc.passes.pack import MICROSOFT, packed_inputs
from rqc.passes.quantize import quantized_of

GROUPS = (("query", "key", "value"), ("gate", "up"))


class PackProjections(Pass):
    """[x W₁ᵀ, x W₂ᵀ, …] = Split(x [W₁; W₂; …]ᵀ), biases stacked alike. Rows of a block grid do not mix: the same
    numbers."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        readers: dict[tuple[ir.Value, int], dict[str, ir.Node]] = {}
        for name, node in linears(model):
            claim = self.description.by_weight.get(name)
            if claim is None or node.op_type != "MatMulNBits" or len(claim.linear.writes) != 1 or claim.expert:
                continue
            source = node.inputs[0]
            assert source is not None
            readers.setdefault((source, claim.layer), {})[claim.linear.writes[0]] = node
        modified = False
        for nodes in readers.values():
            for group in GROUPS:
                if all(kind in nodes for kind in group):
                    modified |= _pack(model, [nodes[kind] for kind in group])
        return ir.passes.PassResult(model, modified=modified)


def _pack(model: ir.Model, nodes: list[ir.Node]) -> bool:
    found = [quantized_of(node.inputs[1]) for node in nodes]
    quantized = [item for item in found if item is not None]
    biases = [node.inputs[5] if len(node.inputs) > 5 else None for node in nodes]
    if len(quantized) != len(nodes) or len({item.grid for item in quantized}) != 1 or (None in biases and any(biases)):
        return False
    stack = quantized[0].stacked(*quantized[1:])
    names = [node.metadata_props[LINEAR] for node in nodes]
    name = _joined(names)
    packed = ir.node(
        "MatMulNBits",
        [nodes[0].inputs[0], *packed_inputs(model, name, stack, _stack_biases(model, name, biases))],
        attributes={**nodes[0].attributes, "N": ir.AttrInt64("N", stack.shape[0])},
        domain=MICROSOFT,
        name=f"{name}/MatMulNBits",
        metadata_props={**_clip(nodes[0]), LINEAR: "+".join(names)},
    )
    packed.outputs[0].name, packed.outputs[0].type = f"{name}.output", ir.TensorType(ir.DataType.FLOAT)
    split = _split(model, name, packed.outputs[0], quantized)
    insert_before(nodes[0], [packed, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        part.name = f"{node.outputs[0].name}.part"
        part.shape, part.type = node.outputs[0].shape, node.outputs[0].type
        replace_uses(node.outputs[0], part)
        _drop(model, node)
    return True


def _clip(node: ir.Node) -> dict[str, str]:
    """The clip ratio of what a linear reads, if it has been recorded: that of all that read the same."""
    return {CLIP: node.metadata_props[CLIP]} if CLIP in node.metadata_props else {}


def _joined(names: list[str]) -> str:
    """model.layers.0.self_attn.q_proj+k_proj+v_proj"""
    stems = [name.removesuffix(".weight") for name in names]
    scope = stems[0].rsplit(".", 1)[0]
    return f"{scope}." + "+".join(stem.rsplit(".", 1)[1] for stem in stems)


def _split(model: ir.Model, name: str, value: ir.Value, quantized: list[LazyQuantized]) -> ir.Node:
    rows = [item.shape[0] for item in quantized]
    sizes = initializer(model, "rqc.split." + "_".join(map(str, rows)), np.asarray(rows, np.int64))
    return ir.node("Split", [value, sizes], attributes={"axis": -1}, num_outputs=len(rows), name=f"{name}/Split")


def _stack_biases(model: ir.Model, name: str, biases: list[ir.Value | None]) -> ir.Value | None:
    tensors = [bias.const_value for bias in biases if bias is not None and bias.const_value is not None]
    if not tensors:
        return None
    stacked = ir.LazyTensor(
        lambda: ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors])),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape([sum(tensor.size for tensor in tensors)]),
        name=f"{name}.bias",
    )
    return lazy_initializer(model, f"{name}.bias", stacked)


def _drop(model: ir.Model, node: ir.Node) -> None:
    inputs = [value for value in node.inputs[1:] if value is not None]
    model.graph.remove(node, safe=True)
    discard(model, inputs)
