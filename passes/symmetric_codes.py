"""Asymmetric grids and signed scales for kernels that know neither: symmetric codes and a product of block sums."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from rqc.models.quantized import LazyQuantized
from rqc.models.signed_codes import left_over, positive_scales, signed_codes
from rqc.passes.base import OFFSET, Pass, discard, insert_before, lazy_initializer, linears
from rqc.passes.quantize import SIGNED, quantized_tensor
from rqc.passes.side_paths import F32, codes_of, lazy_of, side_tensor
from rqc.passes.zero_points import correct


class SymmetricCodes(Pass):
    """x ((q − z) s)ᵀ = x (c s′)ᵀ + P_g(x) lᵀ with c signed, s′ > 0, l = (q − z) s − c s′ per block.

    A correction that a zero-point merge has left is added to l: one product for both.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        corrections = {node.metadata_props[OFFSET]: node for node in model.graph if OFFSET in node.metadata_props}
        modified = False
        for name, node in linears(model):
            dequantize = codes_of(node)
            if dequantize is None:
                continue
            quantized = lazy_of(dequantize)
            stored = f"{name}.left_over"
            if stored in model.graph.initializers or not (quantized.zero_pointed or quantized.grid.signed_scales):
                continue
            shape = (quantized.groups, quantized.shape[0])
            factor = side_tensor(model, stored, shape, partial(_left, quantized), quantized, quantized)
            if name in corrections:
                old = corrections[name].inputs[1]
                corrections[name].replace_input_with(1, factor)
                discard(model, [old])
            else:
                correct(model, node, name, quantized, factor)
            _without_zero_points(model, dequantize, quantized)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _without_zero_points(model: ir.Model, node: ir.Node, quantized: LazyQuantized) -> None:
    """Let a DequantizeLinear read c and s′."""
    kind, stored = SIGNED[quantized.grid.storage_bits]
    codes, scales = (f"{(node.inputs[index].name or '')}.signed" for index in (0, 1))  # type: ignore[union-attr]
    shapes = quantized.shape, (quantized.shape[0], quantized.groups)
    tensors = (
        quantized_tensor(codes, kind, shapes[0], lambda q: signed_codes(q).astype(stored), quantized),
        quantized_tensor(scales, ir.DataType.FLOAT, shapes[1], positive_scales, quantized),
    )
    new = ir.node(
        "DequantizeLinear",
        [lazy_initializer(model, tensor.name or "", tensor) for tensor in tensors],
        attributes={name: attribute.value for name, attribute in node.attributes.items()},
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    output, old = node.outputs[0], list(node.inputs)
    new.outputs[0].name, new.outputs[0].shape, new.outputs[0].type = output.name, output.shape, output.type
    insert_before(node, [new])
    output.replace_all_uses_with(new.outputs[0])
    model.graph.remove(node, safe=True)
    discard(model, old)


def _left(quantized: LazyQuantized) -> F32:
    adapted = quantized.adapted()
    return (left_over(adapted.quantized) + adapted.correction).T
