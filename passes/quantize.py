"""Quantize weights in blocks along their input: W ← (codes − z) · s, as DequantizeLinear in front of the linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from rqc.models.description import Description
from rqc.models.float_grid import AnyGrid, FloatGrid, FloatQuantized
from rqc.models.grid import Quantized
from rqc.models.quantized import Found, LazyQuantized
from rqc.passes.base import QUANTIZED, Pass, discard, insert_before, lazy_initializer, weight_of

SIGNED = {2: (ir.DataType.INT4, ml_dtypes.int4), 4: (ir.DataType.INT4, ml_dtypes.int4), 8: (ir.DataType.INT8, np.int8)}
UNSIGNED = {
    2: (ir.DataType.UINT4, ml_dtypes.uint4),
    4: (ir.DataType.UINT4, ml_dtypes.uint4),
    8: (ir.DataType.UINT8, np.uint8),
}


class QuantizeLinears(Pass):
    """W ← (codes − z) s on `grid`, for every claimed linear but the routers, blocks along the input.

    widths: bits of the linears that have others than the grid. found: codes that calibration has found, by weight; the
    others are rounded to nearest.
    """

    exact = False

    def __init__(
        self,
        description: Description,
        grid: AnyGrid,
        widths: Mapping[str, int] | None = None,
        found: Mapping[str, Found] | None = None,
    ) -> None:
        super().__init__()
        self.description = description
        self.grid = grid
        self.widths = dict(widths or {})
        self.found = dict(found or {})

    @property
    def detail(self) -> str:
        """The grid, and how many linears have another width."""
        others = Counter(bits for bits in self.widths.values() if bits != self.grid.bits)
        return ", ".join([told(self.grid), *(f"{count} of {bits} bit" for bits, count in sorted(others.items()))])

    def grid_of(self, name: str) -> AnyGrid:
        """The grid of one linear's weight."""
        if isinstance(self.grid, FloatGrid):
            return self.grid
        return replace(self.grid, bits=self.widths.get(name, self.grid.bits))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for claim in self.description.claims:
            value = model.graph.initializers.get(claim.weight)
            weight = weight_of(value)
            if claim.quantized and value is not None and weight is not None:
                found = self.found.get(claim.weight)
                lazy = LazyQuantized((weight,), self.grid_of(claim.weight), found=() if found is None else (found,))
                dequantize_before_use(model, value, lazy)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def told(grid: AnyGrid | None) -> str:
    """A grid in words."""
    if grid is None:
        return "float"
    if isinstance(grid, FloatGrid):
        return f"{grid.form.name} floats, group {grid.group_size}, clip {grid.clip}"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return f"{grid.bits} bit, group {grid.group_size}, {kind}, clip {grid.clip}"


def dequantize_before_use(model: ir.Model, value: ir.Value, quantized: LazyQuantized) -> None:
    """Put codes, scales (and zero points) in the place of a float initializer, behind one DequantizeLinear."""
    name = value.name or ""
    node = _dequantize(model, name, quantized)
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}.dequantized", value.shape, ir.TensorType(ir.DataType.FLOAT)
    users = list(value.uses())
    first = min((user for user, _ in users), key=list(model.graph).index)
    insert_before(first, [node])
    for user, index in users:
        user.replace_input_with(index, output)
    del model.graph.initializers[name]


def quantize_again(model: ir.Model, node: ir.Node, quantized: LazyQuantized) -> None:
    """Let a DequantizeLinear read other codes, scales and zero points."""
    name, old = node.metadata_props[QUANTIZED], list(node.inputs)
    uses = list(node.outputs[0].uses())
    for index in range(len(old)):
        node.replace_input_with(index, None)
    discard(model, old)
    new = _dequantize(model, name, quantized)
    output = new.outputs[0]
    output.name, output.shape, output.type = node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type
    insert_before(node, [new])
    for user, index in uses:
        user.replace_input_with(index, output)
    model.graph.remove(node, safe=True)


def _dequantize(model: ir.Model, name: str, quantized: LazyQuantized) -> ir.Node:
    inputs = [_lazy(model, f"{name}.{part}", *spec, quantized) for part, spec in _tensors(quantized).items()]
    return ir.node(
        "DequantizeLinear",
        inputs,
        attributes={"axis": 0} if per_row(quantized) else {"axis": 1, "block_size": quantized.block},
        name=f"{name}/DequantizeLinear",
        metadata_props={QUANTIZED: name},
    )


Spec = tuple[ir.DataType, tuple[int, ...], Callable[[Quantized], np.ndarray]]


def per_row(quantized: LazyQuantized) -> bool:
    """Whether a weight has scales [N], the only ones under which kernels read 8-bit floats."""
    return isinstance(quantized.grid, FloatGrid) and quantized.grid.group_size == -1


def _float_tensors(quantized: LazyQuantized) -> dict[str, Spec]:
    """8-bit floats are stored as such; of 4-bit ones, which ONNX Runtime has no kernel for, the doubles, whole numbers
    in 8 bits under half the scales: the same value, exactly."""
    shape = quantized.shape
    if per_row(quantized):
        return {
            "codes": (ir.DataType.FLOAT8E4M3FN, shape, lambda q: floats(q).form.stored(q.codes)),
            "scales": (ir.DataType.FLOAT, shape[:1], lambda q: q.scales[:, 0]),
        }
    return {
        "codes": (ir.DataType.INT8, shape, lambda q: floats(q).doubled()),
        "scales": (ir.DataType.FLOAT, (shape[0], quantized.groups), lambda q: q.scales / np.float32(2)),
    }


def floats(quantized: Quantized) -> FloatQuantized:
    """A weight that is known to be of small floats."""
    assert isinstance(quantized, FloatQuantized)
    return quantized


def _tensors(quantized: LazyQuantized) -> dict[str, Spec]:
    """Type, shape and value of each tensor; where no zero points are stored, codes are signed."""
    if isinstance(quantized.grid, FloatGrid):
        return _float_tensors(quantized)
    grid, blocks = quantized.grid, (quantized.shape[0], quantized.groups)
    storage, center = grid.storage_bits, grid.center
    signed, stype = SIGNED[storage]
    unsigned, utype = UNSIGNED[storage]
    scales: Spec = (ir.DataType.FLOAT, blocks, lambda q: q.scales)
    if not quantized.zero_pointed:
        return {
            "codes": (
                signed,
                quantized.shape,
                lambda q: (q.codes.astype(np.int16) - center).astype(np.int8).astype(stype),
            ),
            "scales": scales,
        }
    return {
        "codes": (unsigned, quantized.shape, lambda q: q.codes.astype(utype)),
        "scales": scales,
        "zero_points": (unsigned, blocks, lambda q: q.stored_zero_points().astype(utype)),
    }


def _lazy(
    model: ir.Model,
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    value: Callable[[Quantized], np.ndarray],
    quantized: LazyQuantized,
) -> ir.Value:
    return lazy_initializer(model, name, quantized_tensor(name, dtype, shape, value, quantized))


def quantized_tensor(
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    value: Callable[[Quantized], np.ndarray],
    quantized: LazyQuantized,
) -> ir.LazyTensor:
    """One tensor (codes, scales or zero points in some form) of a quantized weight, evaluated when it is written."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(value(quantized.get()), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name
    )
    tensor.meta[QUANTIZED] = quantized
    return tensor


def quantized_of(value: ir.Value | None) -> LazyQuantized | None:
    """The lazy quantized weight behind a tensor, or None."""
    if value is None or value.const_value is None:
        return None
    found = value.const_value.meta.get(QUANTIZED)
    return found if isinstance(found, LazyQuantized) else None
