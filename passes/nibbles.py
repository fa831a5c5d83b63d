"""Split 8-bit codes into nibble planes: ONNX Runtime has a fast float kernel for 4-bit blocks and none for 8-bit
ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rqc.models.grid import Quantized
from rqc.models.packing import pack
from rqc.models.quantized import LazyQuantized
from rqc.passes.base import STORAGE, Pass, discard, insert_before, lazy_initializer, replace_uses
from rqc.passes.pack import MICROSOFT
from rqc.passes.quantize import quantized_of, quantized_tensor


class SplitNibbles(Pass):
    """s (q − z) = 16 s (q₁ − z₁) + s (q₀ − z₀) with q = 16 q₁ + q₀, z = 16 z₁ + z₀: two 4-bit blocks in place of one of
    8 bits.

    At float accumulation an 8-bit MatMulNBits of one row takes 20 to 40 times as long as the pair, of 16 rows 5 times
    (`tools/bench --head`); the bytes are as many. The gather of a tied table reads the same planes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain != MICROSOFT or "bits" not in node.attributes or node.attributes["bits"].as_int() != 8:
                continue
            index = 0 if node.op_type == "GatherBlockQuantized" else 1
            quantized = quantized_of(node.inputs[index])
            if quantized is not None:
                _split(model, node, index, quantized)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _split(model: ir.Model, node: ir.Node, index: int, quantized: LazyQuantized) -> None:
    gather = node.op_type == "GatherBlockQuantized"
    planes = []
    for high in (True, False):
        codes, scales, zeros = _plane(model, node, index, quantized, high)
        if gather:
            inputs: list[ir.Value | None] = [codes, node.inputs[1], scales, zeros]
        else:
            bias = node.inputs[5] if len(node.inputs) > 5 and high else None
            inputs = [node.inputs[0], codes, scales, zeros, *([None, bias] if bias is not None else [])]
        plane = ir.node(
            node.op_type,
            inputs,
            attributes={**node.attributes, "bits": ir.AttrInt64("bits", 4)},
            domain=MICROSOFT,
            name=f"{node.name}/{'high' if high else 'low'}",
            metadata_props=dict(node.metadata_props),
        )
        plane.outputs[0].name, plane.outputs[0].type = f"{plane.name}.out", ir.TensorType(ir.DataType.FLOAT)
        planes.append(plane)
    total = ir.node("Add", [plane.outputs[0] for plane in planes], name=f"{node.name}/Add")
    total.outputs[0].name, total.outputs[0].type = f"{node.name}.sum", ir.TensorType(ir.DataType.FLOAT)
    total.outputs[0].shape = node.outputs[0].shape
    insert_before(node, [*planes, total])
    replace_uses(node.outputs[0], total.outputs[0])
    _drop(model, node)


def _plane(
    model: ir.Model, node: ir.Node, index: int, quantized: LazyQuantized, high: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    old = node.inputs[index]
    assert old is not None
    (n, _), groups, block = quantized.shape, quantized.groups, quantized.block
    width = groups * block // 2
    shape = (n, width) if node.op_type == "GatherBlockQuantized" else (n, groups, block // 2)
    tag = "high" if high else "low"
    codes = quantized_tensor(f"{old.name}.{tag}", ir.DataType.UINT8, shape, _codes(high, shape), quantized)
    codes.meta[STORAGE] = (id(quantized), tag)
    stem = (old.name or "").rsplit(".", 1)[0]
    factor = np.float32(16 if high else 1)
    scales = _once(
        model,
        quantized_tensor(
            f"{stem}.{tag}_scales", ir.DataType.FLOAT, (n, groups), lambda q: q.scales * factor, quantized
        ),
    )
    zeros = _once(
        model, quantized_tensor(f"{stem}.{tag}_zeros", ir.DataType.UINT8, (n, -(-groups // 2)), _zeros(high), quantized)
    )
    return lazy_initializer(model, codes.name or "", codes), scales, zeros


def _codes(high: bool, shape: tuple[int, ...]) -> Callable[[Quantized], np.ndarray]:
    def value(quantized: Quantized) -> np.ndarray:
        whole = quantized.packed_codes().reshape(shape[0], -1)
        return pack(_nibble(whole, high), 4).reshape(shape)

    return value


def _zeros(high: bool) -> Callable[[Quantized], np.ndarray]:
    def value(quantized: Quantized) -> np.ndarray:
        n, groups = quantized.scales.shape
        whole = np.full((n, groups + groups % 2), 128, np.uint8)
        if quantized.zero_points is not None:
            whole[:, :groups] = quantized.zero_points
        return pack(_nibble(whole, high), 4)

    return value


def _nibble(whole: npt.NDArray[np.uint8], high: bool) -> npt.NDArray[np.uint8]:
    return np.right_shift(whole, 4) if high else np.bitwise_and(whole, np.uint8(15))


def _once(model: ir.Model, tensor: ir.LazyTensor) -> ir.Value:
    """The two readers of a tied table share scales and zero points by name."""
    found = model.graph.initializers.get(tensor.name or "")
    return found if found is not None else lazy_initializer(model, tensor.name or "", tensor)


def _drop(model: ir.Model, node: ir.Node) -> None:
    inputs = [value for value in node.inputs if value is not None]
    model.graph.remove(node, safe=True)
    discard(model, inputs)
