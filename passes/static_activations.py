"""Static activation scales: what integer products of TensorRT want, from the calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rqc.models.description import HEAD
from rqc.passes.activations import rounded_linears
from rqc.passes.base import LINEAR, Pass, initializer, linears
from rqc.passes.build import Builder

RANGE = "rqc.range"
"""Mark on a linear: the largest magnitude that its input has on the calibration text."""
LIMIT = 127
Statistic = Literal["largest", "mean"]


class Measure(Protocol):
    """Measures values of a graph on the calibration text."""

    def __call__(
        self, model: ir.Model, names: Sequence[str], kind: Statistic = "largest"
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        """The largest magnitude, or the mean, in each channel (the last axis) of each value, by name."""


class RecordRanges(Pass):
    """Marks every linear with the largest |x| of its input on the calibration text; nothing is computed otherwise."""

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measure = measure

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        inputs = {
            name: node.inputs[0].name or ""
            for name, node in linears(model)
            if node.inputs[0] is not None and RANGE not in node.metadata_props and name != HEAD
        }
        if not inputs:
            return ir.passes.PassResult(model, modified=False)
        found = self.measure(model, sorted(set(inputs.values())))
        for name, node in linears(model):
            if name in inputs:
                # three digits: the same on every machine, whatever the order of its sums
                node.metadata_props[RANGE] = f"{found[inputs[name]].max():.3g}"
        return ir.passes.PassResult(model, modified=True)


class StaticActivations(Pass):
    """x ← s · clamp(round(x / s), −128, 127) with s = range / 127 for the whole tensor, in front of every quantized
    linear but the head: QuantizeLinear and DequantizeLinear, which TensorRT makes an int8 product of.

    Only beside weights with one scale per channel: with blocks TensorRT builds such a product wrongly, without a word.
    """

    exact = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[ir.Value, ir.Value] = {}
        for _, node in rounded_linears(model):
            source = node.inputs[0]
            if source is None or source.metadata_props.get("rqc.grid"):
                continue
            if source not in done:
                done[source] = _round(model, node, source)
            node.replace_input_with(0, done[source])
        return ir.passes.PassResult(model, modified=bool(done))


def _round(model: ir.Model, node: ir.Node, x: ir.Value) -> ir.Value:
    dtype = x.dtype or ir.DataType.FLOAT
    step = max(float(node.metadata_props[RANGE]), 1e-4) / LIMIT
    scope = f"{node.metadata_props[LINEAR].removesuffix('.weight')}/activation"
    scale = initializer(model, f"{scope}.scale", np.asarray(step, dtype.numpy()))
    build = Builder(node, scope)
    codes = build.op("QuantizeLinear", x, scale, dtype=ir.DataType.INT8, output_dtype=ir.DataType.INT8.value)
    grid = build.op("DequantizeLinear", codes, scale, dtype=dtype)
    grid.metadata_props["rqc.grid"] = f"per tensor, {step:g}"
    grid.shape = x.shape
    return grid
