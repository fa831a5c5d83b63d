"""Quantize activations: the last lossy step, on the grid of the target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from rqc.models.description import HEAD
from rqc.models.token_grid import TINY, TokenGrid
from rqc.passes.base import CLIP, PADDED, Pass, initializer, linears
from rqc.passes.build import Builder
from rqc.passes.side_paths import codes_of, readers


class QuantizeActivations(Pass):
    """x ← s · clamp(round(x / s)) per token, on a `TokenGrid`, in front of every quantized linear but the head.

    Dynamic. A linear that is marked with a clip ratio has that one; linears that read the same x share what it becomes.
    The device computes it in float on this grid. Side paths of an adapter read what their linear reads.
    """

    exact = False

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid

    @property
    def detail(self) -> str:
        """The grid."""
        return str(self.grid)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[tuple[ir.Value, TokenGrid], ir.Value] = {}
        rounding: dict[tuple[ir.Value, TokenGrid], set[str]] = {}
        for name, node in rounded_linears(model):
            reader = _reader(node)
            source = reader.inputs[0]
            if source is None or source.metadata_props.get("rqc.grid"):
                continue
            key = source, replace(self.grid, clip=float(node.metadata_props.get(CLIP, self.grid.clip)))
            if key not in done:
                done[key] = _round(model, Builder(reader, f"{name.removesuffix('.weight')}/activation"), *key)
            reader.replace_input_with(0, done[key])
            rounding.setdefault(key, set()).update(name.split("+"))
        beside = [(node, key) for key, names in rounding.items() for node in readers(key[0], names)]
        for node, key in beside:
            node.replace_input_with(0, done[key])
        if beside:
            model.graph.sort()  # stable: a side path may begin in front of its linear
        return ir.passes.PassResult(model, modified=bool(done))


def _round(model: ir.Model, build: Builder, x: ir.Value, grid: TokenGrid) -> ir.Value:
    kind, source = x.dtype or ir.DataType.FLOAT, x
    if kind != ir.DataType.FLOAT:  # codes of half a step are halves of a code in half precision
        x = build.op("Cast", x, to=ir.DataType.FLOAT.value)
    rounded = (_symmetric if grid.symmetric else _asymmetric)(model, build, x, grid)
    if kind != ir.DataType.FLOAT:
        rounded = build.op("Cast", rounded, dtype=kind, to=kind.value)
    rounded.metadata_props["rqc.grid"] = str(grid)
    rounded.shape = source.shape
    return rounded


def _symmetric(model: ir.Model, build: Builder, x: ir.Value, grid: TokenGrid) -> ir.Value:
    scale = _scale(model, build, build.op("ReduceMax", build.op("Abs", x), _last(model), keepdims=1), grid)
    codes = build.op("Round", build.op("Div", x, scale))
    if grid.clip < 1:
        codes = build.op("Clip", codes, _number(model, -grid.limit - 1), _number(model, grid.limit))
    return build.op("Mul", codes, scale)


def _asymmetric(model: ir.Model, build: Builder, x: ir.Value, grid: TokenGrid) -> ir.Value:
    """Codes are counted from the zero point: that is −bottom, and nothing has to be taken off to read them back."""
    zero = _number(model, 0)
    lowest = build.op("Min", build.op("ReduceMin", x, _last(model), keepdims=1), zero)
    highest = build.op("Max", build.op("ReduceMax", x, _last(model), keepdims=1), zero)
    scale = _scale(model, build, build.op("Sub", highest, lowest), grid)
    reach = build.op("Div", lowest, scale)
    if grid.clip < 1:
        reach = build.op("Mul", reach, _number(model, grid.clip))
    bottom = build.op("Round", reach)
    codes = build.op("Round", build.op("Div", x, scale))
    if grid.clip < 1:
        codes = build.op("Max", codes, bottom)
    # without clipping too: where both ends round away from 0 there is a code too many
    codes = build.op("Min", codes, build.op("Add", bottom, _number(model, grid.steps)))
    return build.op("Mul", codes, scale)


def _scale(model: ir.Model, build: Builder, extent: ir.Value, grid: TokenGrid) -> ir.Value:
    lowest = initializer(model, "rqc.tiny", np.float32(TINY))
    return build.op("Max", build.op("Div", extent, _number(model, grid.divisor)), lowest)


def _number(model: ir.Model, value: float | np.float32) -> ir.Value:
    return initializer(model, f"rqc.limit.{value:.9g}", np.float32(value))


def _last(model: ir.Model) -> ir.Value:
    return initializer(model, "rqc.last_axis", np.asarray([-1], np.int64))


def rounded_linears(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """(name, node) of every linear whose input is rounded: the quantized ones, but not the head."""
    for name, node in linears(model):
        if name != HEAD and (node.op_type == "MatMulNBits" or codes_of(node) is not None):
            yield name, node


def _reader(node: ir.Node) -> ir.Node:
    """The node that reads x itself: a linear, or the Pad in front of it."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer if producer is not None and PADDED in producer.metadata_props else node
