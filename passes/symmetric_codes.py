"""Asymmetric grids and signed scales for kernels that know neither: symmetric codes and a product of block sums."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from rqc.models.quantized import LazyQuantized
from rqc.models.signed_codes import left_over
from rqc.passes.base import OFFSET, Pass, discard, linears
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
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _left(quantized: LazyQuantized) -> F32:
    adapted = quantized.adapted()
    return (left_over(adapted.quantized) + adapted.correction).T
