"""Quantize activations: the last lossy step, on the grid of the target."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from rqc.models.description import HEAD
from rqc.passes.base import PADDED, Pass, initializer, linears
from rqc.passes.build import Builder
from rqc.passes.side_paths import codes_of, readers


class QuantizeActivations(Pass):
    """x ← s · clamp(round(x / s)) with s = absmax / (2^(b−1) − 1) per token, in front of every quantized linear but the
    head.

    Symmetric, dynamic, without clipping (RoLoRA's setting); a zero token keeps scale 1. The device computes it in float
    on this grid. Side paths of an adapter read what their linear reads.
    """

    exact = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.limit = float(2 ** (bits - 1) - 1)

    @property
    def detail(self) -> str:
        """Bits per activation."""
        return f"{self.bits} bit per token"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[ir.Value, ir.Value] = {}
        rounding: dict[ir.Value, set[str]] = {}
        for name, node in rounded_linears(model):
            reader = _reader(node)
            source = reader.inputs[0]
            if source is None or source.metadata_props.get("rqc.grid"):
                continue
            if source not in done:
                done[source] = self._quantize(model, reader, name, source)
            reader.replace_input_with(0, done[source])
            rounding.setdefault(source, set()).update(name.split("+"))
        beside = [(node, source) for source, names in rounding.items() for node in readers(source, names)]
        for node, source in beside:
            node.replace_input_with(0, done[source])
        if beside:
            model.graph.sort()  # stable: a side path may begin in front of its linear
        return ir.passes.PassResult(model, modified=bool(done))

    def _quantize(self, model: ir.Model, anchor: ir.Node, name: str, x: ir.Value) -> ir.Value:
        build = Builder(anchor, f"{name.removesuffix('.weight')}/activation")
        kind, source = x.dtype or ir.DataType.FLOAT, x
        if kind != ir.DataType.FLOAT:  # codes of half a step are halves of a code in half precision
            x = build.op("Cast", x, to=ir.DataType.FLOAT.value)
        limit = initializer(model, f"rqc.limit.{self.limit:g}", np.float32(self.limit))
        lowest = initializer(model, "rqc.tiny", np.float32(np.finfo(np.float32).tiny))
        last = initializer(model, "rqc.last_axis", np.asarray([-1], np.int64))
        absmax = build.op("ReduceMax", build.op("Abs", x), last, keepdims=1)
        scale = build.op("Max", build.op("Div", absmax, limit), lowest)
        grid = build.op("Mul", build.op("Round", build.op("Div", x, scale)), scale)
        if kind != ir.DataType.FLOAT:
            grid = build.op("Cast", grid, dtype=kind, to=kind.value)
        grid.metadata_props["rqc.grid"] = f"per token, {self.limit:g}"
        grid.shape = source.shape
        return grid


def rounded_linears(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """(name, node) of every linear whose input is rounded: the quantized ones, but not the head."""
    for name, node in linears(model):
        if name != HEAD and (node.op_type == "MatMulNBits" or codes_of(node) is not None):
            yield name, node


def _reader(node: ir.Node) -> ir.Node:
    """The node that reads x itself: a linear, or the Pad in front of it."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer if producer is not None and PADDED in producer.metadata_props else node
