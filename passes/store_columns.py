"""Weights as TensorRT reads them: signed codes [K, N] with blocks along axis 0, or 8 bits with one scale per column,
integers or floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.models.float_grid import FloatGrid
from rqc.models.grid import Quantized
from rqc.models.quantized import LazyQuantized
from rqc.models.signed_codes import positive_scales, signed_codes
from rqc.passes.base import LINEAR, PADDED, QUANTIZED, Pass, discard, initializer, insert_before, lazy_initializer
from rqc.passes.build import Builder
from rqc.passes.quantize import floats, quantized_of, quantized_tensor
from rqc.runtime.errors import TargetError

Values = Callable[[Quantized], NDArray[np.generic]]


class StoreColumns(Pass):
    """x Ŵᵀ = x DequantizeLinear(codes [K, N], scales [K/g, N]): no Transpose is left between codes and product.

    K is padded to whole blocks with codes 0, x with zeros. 8-bit codes have one scale per column [N]. Tables stay
    [rows, width], for the Gather; a tied head reads them through its Transpose. Zero points must be gone
    (`SymmetricCodes`). 4-bit floats are still doubled (`StoreFloat4` undoes it).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "DequantizeLinear" or QUANTIZED not in node.metadata_props:
                continue
            quantized = quantized_of(node.inputs[0])
            assert quantized is not None
            if node.inputs[0] is None or (node.inputs[0].name or "").endswith((".columns", ".rows")):
                continue
            form = _Form.of(node, quantized)
            _replace(model, node, form)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


class _Form:
    """How one weight is stored: the type and shape of its codes and scales and how they are made."""

    def __init__(self, name: str, quantized: LazyQuantized, columns: bool) -> None:
        self.name, self.quantized, self.columns = name, quantized, columns
        self.floats = isinstance(quantized.grid, FloatGrid)
        self.bytes = quantized.grid.storage_bits == 8
        if self.bytes and quantized.grid.group_size != -1:
            raise TargetError(f"{name}: 8-bit codes in groups of {quantized.block}", hint="--group-size -1")

    @classmethod
    def of(cls, node: ir.Node, quantized: LazyQuantized) -> _Form:
        """Columns for the weight of linears, rows where a Gather reads it."""
        users = {user.op_type for user, _ in node.outputs[0].uses()}
        return cls(node.metadata_props[QUANTIZED], quantized, columns=users == {"Transpose"})

    @property
    def padding(self) -> int:
        """Inputs of zeros that fill the last block."""
        rows = self.bytes or not self.columns
        return 0 if rows else -self.quantized.shape[1] % self.quantized.block

    @property
    def attributes(self) -> dict[str, int]:
        """Of the DequantizeLinear."""
        if self.bytes:
            return {"axis": 1 if self.columns else 0}
        return {"axis": 0 if self.columns else 1, "block_size": self.quantized.block}

    def tensors(self) -> list[ir.LazyTensor]:
        """Codes and scales."""
        (n, k), groups = self.quantized.shape, self.quantized.groups
        shape = (k + self.padding, n) if self.columns else (n, k)
        blocks = (n,) if self.bytes else (groups, n) if self.columns else (n, groups)
        stem = f"{self.name}.{'columns' if self.columns else 'rows'}"
        return [
            quantized_tensor(stem, self._kind, shape, self._codes, self.quantized),
            quantized_tensor(f"{stem}.scales", ir.DataType.FLOAT, blocks, self._scales, self.quantized),
        ]

    @property
    def _kind(self) -> ir.DataType:
        """Of the codes."""
        if self.floats:
            return ir.DataType.FLOAT8E4M3FN if self.bytes else ir.DataType.INT8
        return ir.DataType.INT8 if self.bytes else ir.DataType.INT4

    def _codes(self, quantized: Quantized) -> NDArray[np.generic]:
        codes: NDArray[np.generic]
        if self.floats:
            codes = floats(quantized).codes if self.bytes else floats(quantized).doubled()
        else:
            codes = signed_codes(quantized)
        if self.padding:
            codes = np.pad(codes, ((0, 0), (0, self.padding)))
        codes = np.ascontiguousarray(codes.T) if self.columns else codes
        return codes.view(self._kind.numpy()) if self.bytes else codes.astype(self._kind.numpy())

    def _scales(self, quantized: Quantized) -> NDArray[np.generic]:
        if self.floats and not self.bytes:
            return np.ascontiguousarray(quantized.scales.T) / np.float32(2)
        scales = positive_scales(quantized)
        if self.bytes:
            return np.ascontiguousarray(scales[:, 0])
        return np.ascontiguousarray(scales.T) if self.columns else scales


def _replace(model: ir.Model, node: ir.Node, form: _Form) -> None:
    codes, scales = (lazy_initializer(model, tensor.name or "", tensor) for tensor in form.tensors())
    new = ir.node(
        "DequantizeLinear",
        [codes, scales],
        attributes=form.attributes,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    output, old = new.outputs[0], list(node.inputs)
    output.name, output.type = f"{form.name}.value", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape(codes.shape or ())
    insert_before(node, [new])
    for user, index in list(node.outputs[0].uses()):
        if form.columns:
            _skip(model, user, output, form)
        else:
            user.replace_input_with(index, output)
    model.graph.remove(node, safe=True)
    discard(model, old)


def _skip(model: ir.Model, transpose: ir.Node, weight: ir.Value, form: _Form) -> None:
    """Let the products behind a Transpose read the columns, and x in whole blocks."""
    for user, index in list(transpose.outputs[0].uses()):
        if LINEAR not in user.metadata_props or index != 1:
            raise TargetError(f"{user.name} reads {form.name}, which is a linear's weight", hint="use --target onnx")
        user.replace_input_with(1, weight)
        if form.padding:
            user.replace_input_with(0, _padded(model, user, form.padding))
    model.graph.remove(transpose, safe=True)


def _padded(model: ir.Model, node: ir.Node, padding: int) -> ir.Value:
    """x with zeros behind it, one for all that reads x in blocks of the same size."""
    x = node.inputs[0]
    assert x is not None
    for user, _ in x.uses():
        if user.metadata_props.get(PADDED) == str(padding):
            return user.outputs[0]
    widths = initializer(model, f"rqc.pad.{padding}", np.asarray([0] * 5 + [padding], np.int64))
    build = Builder(node, f"{node.metadata_props[LINEAR].removesuffix('.weight')}/whole_blocks")
    padded = build.op("Pad", x, widths)
    producer = padded.producer()
    assert producer is not None
    producer.metadata_props[PADDED] = str(padding)
    return padded
