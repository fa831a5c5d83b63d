"""Pack: DequantizeLinear + MatMul become MatMulNBits, DequantizeLinear + Gather become GatherBlockQuantized; same
numbers."""

from __future__ import annotations

import onnx_ir as ir

from rqc.models.grid import Quantized
from rqc.models.quantized import LazyQuantized
from rqc.passes.base import LINEAR, QUANTIZED, STORAGE, Pass, insert_before, lazy_initializer, replace_uses
from rqc.passes.quantize import quantized_of, quantized_tensor

MICROSOFT = "com.microsoft"


class PackBlocks(Pass):
    """x ((codes − z) s)ᵀ + b as one MatMulNBits at float accumulation; a gather of dequantized rows as one
    GatherBlockQuantized.

    Codes go low bits first, K padded with the zero point. The two readers of a tied table share its bytes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.opset_imports.setdefault(MICROSOFT, 1)
        modified = False
        for node in list(model.graph):
            if node.op_type == "DequantizeLinear" and QUANTIZED in node.metadata_props:
                _pack(model, node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _pack(model: ir.Model, dequantize: ir.Node) -> None:
    quantized = quantized_of(dequantize.inputs[0])
    assert quantized is not None
    name = dequantize.metadata_props[QUANTIZED]
    for user, _ in list(dequantize.outputs[0].uses()):
        if user.op_type == "Gather":
            _gather(model, user, name, quantized)
        else:
            for matmul, _ in list(user.outputs[0].uses()):
                _matmul(model, matmul, name, quantized)
            _remove(model, user)
    codes = [value for value in dequantize.inputs if value is not None]
    _remove(model, dequantize)
    for value in codes:
        del model.graph.initializers[value.name or ""]


def _matmul(model: ir.Model, node: ir.Node, name: str, quantized: LazyQuantized) -> None:
    biased = bias_add(node)
    bias = (
        next((v for v in biased.inputs if v is not None and v.is_initializer()), None) if biased is not None else None
    )
    (n, k), grid = quantized.shape, quantized.grid
    packed = ir.node(
        "MatMulNBits",
        [node.inputs[0], *packed_inputs(model, name, quantized, bias)],
        attributes={"K": k, "N": n, "bits": grid.storage_bits, "block_size": quantized.block, "accuracy_level": 0},
        domain=MICROSOFT,
        name=f"{name.removesuffix('.weight')}/MatMulNBits",
        metadata_props=dict(node.metadata_props),
    )
    last = biased or node
    output = packed.outputs[0]
    output.name, output.shape, output.type = f"{name}.output", last.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
    insert_before(node, [packed])
    replace_uses(last.outputs[0], output)
    if biased is not None:
        _remove(model, biased)
    _remove(model, node)


def packed_inputs(model: ir.Model, name: str, quantized: LazyQuantized, bias: ir.Value | None) -> list[ir.Value | None]:
    """B, scales, zero_points, g_idx, bias of MatMulNBits; trailing absent ones are left out."""
    (n, _), groups, grid = quantized.shape, quantized.groups, quantized.grid
    blob = quantized.block * grid.storage_bits // 8
    codes = quantized_tensor(f"{name}.packed", ir.DataType.UINT8, (n, groups, blob), Quantized.packed_codes, quantized)
    inputs: list[ir.Value | None] = [_shared(model, codes, quantized), *_scales(model, name, quantized)]
    if bias is not None:
        inputs += [None] * (4 - len(inputs)) + [bias]
    return inputs


def _gather(model: ir.Model, node: ir.Node, name: str, quantized: LazyQuantized) -> None:
    (rows, width), grid = quantized.shape, quantized.grid
    table = quantized_tensor(
        f"{name}.table",
        ir.DataType.UINT8,
        (rows, width * grid.storage_bits // 8),
        lambda q: q.packed_codes().reshape(q.shape[0], -1),
        quantized,
    )
    scales, *zeros = _scales(model, name, quantized)
    gather = ir.node(
        "GatherBlockQuantized",
        [_shared(model, table, quantized), node.inputs[1], scales, *zeros],
        attributes={"bits": grid.storage_bits, "block_size": quantized.block, "gather_axis": 0, "quantize_axis": 1},
        domain=MICROSOFT,
        name=f"{name.removesuffix('.weight')}/GatherBlockQuantized",
    )
    output = gather.outputs[0]
    output.name, output.shape, output.type = f"{name}.rows", node.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
    insert_before(node, [gather])
    replace_uses(node.outputs[0], output)
    _remove(model, node)


def _scales(model: ir.Model, name: str, quantized: LazyQuantized) -> list[ir.Value]:
    """Scales [N, G] and, where there are any, packed zero points: shared by the two readers of a tied table."""
    (n, _), groups, grid = quantized.shape, quantized.groups, quantized.grid
    if f"{name}.packed_scales" in model.graph.initializers:
        found = (model.graph.initializers.get(f"{name}.packed_{part}") for part in ("scales", "zeros"))
        return [value for value in found if value is not None]
    scales = quantized_tensor(f"{name}.packed_scales", ir.DataType.FLOAT, (n, groups), lambda q: q.scales, quantized)
    values = [lazy_initializer(model, scales.name or "", scales)]
    if quantized.zero_pointed:
        width = -(-groups * grid.storage_bits // 8)
        zeros = quantized_tensor(
            f"{name}.packed_zeros", ir.DataType.UINT8, (n, width), Quantized.packed_zero_points, quantized
        )
        values.append(lazy_initializer(model, zeros.name or "", zeros))
    return values


def _shared(model: ir.Model, tensor: ir.LazyTensor, quantized: LazyQuantized) -> ir.Value:
    tensor.meta[STORAGE] = (id(quantized), "codes")
    return lazy_initializer(model, tensor.name or "", tensor)


def bias_add(node: ir.Node) -> ir.Node | None:
    """The Add of a bias initializer that alone reads this linear, if there is one."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0][0].op_type != "Add":
        return None
    add = users[0][0]
    bias = add.inputs[1 - users[0][1]]
    name = node.metadata_props.get(LINEAR, "").removesuffix("weight") + "bias"
    return add if bias is not None and bias.is_initializer() and bias.name == name else None


def _remove(model: ir.Model, node: ir.Node) -> None:
    model.graph.remove(node, safe=True)
