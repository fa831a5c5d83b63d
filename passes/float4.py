"""Store weights of NVFP4 as such: 4-bit floats under 8-bit float scales under one float32 scale per tensor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.models.float_grid import FloatGrid
from rqc.models.packing import Quantized
from rqc.models.quantized import LazyQuantized
from rqc.models.small_floats import E2M1, E4M3
from rqc.passes.base import LATE, QUANTIZED, WIDE, Pass, discard, insert_before, lazy_initializer, sizes
from rqc.passes.quantize import floats, quantized_of, quantized_tensor


class StoreFloat4(Pass):
    """(2 v)(s / 2) = v (c g): DequantizeLinear(v [K, N], DequantizeLinear(c [K/16, N], g)), v in E2M1, c in E4M3.

    Both stay in float32, as g is, until the weight is cast as a whole (`CastFloats`). ONNX Runtime has no such kernel
    on a CPU: no stage from here on runs there as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "DequantizeLinear" or QUANTIZED not in node.metadata_props:
                continue
            codes = node.inputs[0]
            quantized = quantized_of(codes)
            assert codes is not None
            assert quantized is not None
            if isinstance(quantized.grid, FloatGrid) and codes.dtype == ir.DataType.INT8:
                _replace(model, node, quantized)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _replace(model: ir.Model, node: ir.Node, quantized: LazyQuantized) -> None:
    """Let a weight [K, N], padded or not, read v, c and g."""
    name, old, output = node.metadata_props[QUANTIZED], list(node.inputs), node.outputs[0]
    shapes = sizes(old[0]), sizes(old[1])
    stem = f"{name}.float4"

    def codes(found: Quantized) -> NDArray[np.generic]:
        columns = np.zeros(shapes[0], np.uint8)
        columns[: quantized.shape[1]] = found.codes.T
        return E2M1.stored(columns)

    tensors = (
        quantized_tensor(stem, ir.DataType.FLOAT4E2M1, shapes[0], codes, quantized),
        quantized_tensor(
            f"{stem}.scales",
            ir.DataType.FLOAT8E4M3FN,
            shapes[1],
            lambda q: E4M3.stored(floats(q).scale_codes().T),
            quantized,
        ),
        quantized_tensor(f"{stem}.unit", ir.DataType.FLOAT, (), _unit, quantized),
    )
    tensors[-1].meta[LATE] = True
    v, c, g = (lazy_initializer(model, tensor.name or "", tensor) for tensor in tensors)
    inner = ir.node("DequantizeLinear", [c, g], name=f"{name}/scales", metadata_props={WIDE: name})
    scales = inner.outputs[0]
    scales.name, scales.type, scales.shape = f"{stem}.steps", ir.TensorType(ir.DataType.FLOAT), c.shape
    outer = ir.node(
        "DequantizeLinear",
        [v, scales],
        attributes={key: attribute.value for key, attribute in node.attributes.items()},
        name=node.name,
        metadata_props={**node.metadata_props, WIDE: name},
    )
    new = outer.outputs[0]
    new.name, new.type, new.shape = output.name, output.type, output.shape
    insert_before(node, [inner, outer])
    output.replace_all_uses_with(new)
    model.graph.remove(node, safe=True)
    discard(model, old)


def _unit(quantized: Quantized) -> NDArray[np.generic]:
    return np.asarray(floats(quantized).unit, np.float32)
