"""Codes of a weight as they lie in an engine: in MatMulNBits and GatherBlockQuantized, or behind DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.models.float_grid import FloatQuantized
from rqc.models.grid import STORAGE_BITS
from rqc.models.packing import U8, Quantized, unpack
from rqc.models.small_floats import E2M1, E4M3, SmallFloat
from rqc.passes.base import PADDED

BLOCK_OPS = ("MatMulNBits", "GatherBlockQuantized")
FORMS = {ir.DataType.FLOAT8E4M3FN: E4M3, ir.DataType.FLOAT4E2M1: E2M1}
"""Types whose codes are small floats."""
Read = Callable[[ir.Value | None], NDArray[Any]]
"""Values of an initializer; of 4 bits, maybe the packed bytes."""


def dequantize_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that gives a linear or a gather its weight, maybe through a Transpose or, in float32, a
    Cast; None if none does."""
    producer = _producer(node.inputs[0 if node.op_type == "Gather" else 1])
    if producer is not None and producer.op_type in ("Transpose", "Cast"):
        producer = _producer(producer.inputs[0])
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def padding_of(node: ir.Node) -> ir.Node | None:
    """The Pad that fills a linear's x up to whole blocks, if there is one."""
    producer = _producer(node.inputs[0])
    return producer if producer is not None and PADDED in producer.metadata_props else None


@dataclass(frozen=True)
class StoredPlane:
    """The weight that one node computes with, on a grid of `bits`; block: that of scales and zero points."""

    node: ir.Node
    bits: int
    block: int
    read: Read

    def quantized(self) -> Quantized:
        """Codes, scales and zero points, [N, K] and [N, G]."""
        dequantize = dequantize_of(self.node)
        if dequantize is None:
            return self._packed()
        codes = dequantize.inputs[0]
        form = FORMS.get(codes.dtype) if codes is not None and codes.dtype is not None else None
        return self._dequantized(dequantize) if form is None else self._floats(dequantize, form)

    def _packed(self) -> Quantized:
        node, storage = self.node, self.node.attributes["bits"].as_int()
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
        codes = node.inputs[1 if node.op_type == "MatMulNBits" else 0]
        width = node.attributes["K"].as_int() if node.op_type == "MatMulNBits" else None
        packed, steps = self.read(codes), np.asarray(self.read(node.inputs[2]), np.float32)
        unpacked = unpack(packed.reshape(len(packed), -1).view(np.uint8), storage)
        steps = steps.reshape(len(unpacked), -1)
        points = np.full(steps.shape, 1 << (storage - 1), np.uint8)
        if zeros is not None:
            points = unpack(self.read(zeros).reshape(len(unpacked), -1).view(np.uint8), storage)[:, : steps.shape[1]]
        return Quantized(unpacked[:, :width], steps, points, self.bits, storage, self.block)

    def _dequantized(self, dequantize: ir.Node) -> Quantized:
        """Signed codes, whose zero point is the centre: columns [K, N] where a product reads them as they are."""
        values, steps = (dequantize.inputs[index] for index in (0, 1))
        codes, scales = self._signed(values), np.asarray(self.read(steps), np.float32)
        if self.node.op_type != "Gather" and _producer(self.node.inputs[1]) is dequantize:
            codes, scales = codes.T, scales.T
        width = self._width(codes.shape[1])
        groups = -(-width // self.block)
        if scales.ndim == 1:
            scales = np.broadcast_to(scales[:, None], (len(scales), groups))
        storage = STORAGE_BITS[self.bits]
        center = 1 << (storage - 1)
        unsigned: U8 = (codes[:, :width].astype(np.int16) + center).astype(np.uint8)
        points = np.full(scales.shape, center, np.uint8)
        return Quantized(
            np.ascontiguousarray(unsigned), np.ascontiguousarray(scales), points, self.bits, storage, self.block
        )

    def _floats(self, dequantize: ir.Node, form: SmallFloat) -> FloatQuantized:
        """Codes of small floats, columns [K, N], under scales of each or under those of blocks and one for them all."""
        values, steps = (dequantize.inputs[index] for index in (0, 1))
        codes, unit, inner = self._float_codes(values).T, 1.0, _producer(steps)
        if inner is None:
            scales = np.asarray(self.read(steps), np.float32)[:, None]
        else:
            unit = float(np.asarray(self.read(inner.inputs[1]), np.float32))
            scales = E4M3.values(self._float_codes(inner.inputs[0])).T * np.float32(unit)
        codes, scales = np.ascontiguousarray(codes[:, : self._width(codes.shape[1])]), np.ascontiguousarray(scales)
        return FloatQuantized(codes, scales, None, form.bits, form.bits, self.block, form=form, unit=unit)

    def _float_codes(self, value: ir.Value | None) -> U8:
        """Codes of a stored tensor of small floats, one to a byte."""
        assert value is not None
        assert value.shape is not None
        shape, stored = tuple(value.shape.numpy()), self.read(value)
        if value.dtype == ir.DataType.FLOAT4E2M1 and stored.dtype == np.uint8:
            return unpack(stored.reshape(-1), E2M1.bits)[: int(np.prod(shape))].reshape(shape)
        return stored.view(np.uint8)

    def _width(self, stored: int) -> int:
        """Inputs of a weight that is stored with that many: without those that fill the last block."""
        padding = padding_of(self.node)
        return stored - (0 if padding is None else int(padding.metadata_props[PADDED]))

    def _signed(self, value: ir.Value | None) -> NDArray[np.int8]:
        assert value is not None
        assert value.shape is not None
        shape, stored = tuple(value.shape.numpy()), self.read(value)
        if value.dtype == ir.DataType.INT4 and stored.dtype == np.uint8:  # two to a byte, the first in the low half
            nibbles = unpack(stored.reshape(-1), 4)[: int(np.prod(shape))].reshape(shape)
            return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)
        return stored.astype(np.int8)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
