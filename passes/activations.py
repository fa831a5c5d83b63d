"""Quantize activations: the last lossy step, on the grid of the target."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.models.description import HEAD
from rqc.passes.base import LINEAR, Pass, initializer, insert_before, linears
from rqc.passes.side_paths import readers


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
        for name, node in linears(model):
            source = node.inputs[0]
            if node.op_type != "MatMulNBits" or name == HEAD or source is None or source.metadata_props.get("rqc.grid"):
                continue
            if source not in done:
                done[source] = self._quantize(model, node, source)
            node.replace_input_with(0, done[source])
            rounding.setdefault(source, set()).update(name.split("+"))
        beside = [(node, source) for source, names in rounding.items() for node in readers(source, names)]
        for node, source in beside:
            node.replace_input_with(0, done[source])
        if beside:
            model.graph.sort()  # stable: a side path may begin in front of its linear
        return ir.passes.PassResult(model, modified=bool(done))

    def _quantize(self, model: ir.Model, anchor: ir.Node, x: ir.Value) -> ir.Value:
        scope = f"{anchor.metadata_props[LINEAR].removesuffix('.weight')}/activation"
        nodes: list[ir.Node] = []

        def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            node = ir.node(kind, list(inputs), attributes=attributes, name=f"{scope}/{kind}_{len(nodes)}")
            node.outputs[0].name, node.outputs[0].type = f"{scope}.{len(nodes)}", ir.TensorType(ir.DataType.FLOAT)
            nodes.append(node)
            return node.outputs[0]

        limit = initializer(model, f"rqc.limit.{self.limit:g}", np.float32(self.limit))
        lowest = initializer(model, "rqc.tiny", np.float32(np.finfo(np.float32).tiny))
        last = initializer(model, "rqc.last_axis", np.asarray([-1], np.int64))
        absmax = op("ReduceMax", op("Abs", x), last, keepdims=1)
        scale = op("Max", op("Div", absmax, limit), lowest)
        grid = op("Mul", op("Round", op("Div", x, scale)), scale)
        grid.metadata_props["rqc.grid"] = f"per token, {self.limit:g}"
        grid.shape = x.shape
        insert_before(anchor, nodes)
        return grid
