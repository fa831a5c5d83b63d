"""What side paths of linears share: where they leave x, where they join y, and the quantized weight beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.models.quantized import LazyQuantized, Update
from rqc.passes.base import (
    ADAPTER,
    BRANCH_A,
    JOIN,
    LINEAR,
    QUANTIZED,
    SUMS,
    insert_after,
    lazy_initializer,
    linears,
    replace_uses,
    sizes,
)
from rqc.passes.pack import bias_add
from rqc.passes.quantize import quantized_of
from rqc.runtime.errors import InputError, SchemeError, UnsupportedModelError

F32 = NDArray[np.float32]


def addressed(model: ir.Model, deltas: Mapping[str, Delta]) -> Iterator[tuple[str, ir.Node, Delta]]:
    """(name, node, delta) of the linears that `deltas` names, in graph order.

    Raises UnsupportedModelError for a name that no linear of the graph has, InputError for a delta of another shape.
    """
    nodes = dict(linears(model))
    for name, delta in deltas.items():
        if name not in nodes:
            raise UnsupportedModelError(
                f"the adapter has a part for {name!r}, which is no linear of the graph",
                hint="adapters are put beside linears before these are packed, and never beside tables",
            )
        shape = sizes(nodes[name].inputs[1])[::-1]
        if delta.shape != shape:
            raise InputError(
                f"{name}: an update of {list(delta.shape)} for a weight of {list(shape)}",
                hint="the adapter is of another model",
            )
    for name, node in nodes.items():
        if name in deltas:
            yield name, node, deltas[name]


def dequantize_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear behind a linear's weight, or None where that is stored as floats.

    Raises SchemeError if something else reads that weight too: it is a tied table.
    """
    producer = codes_of(node)
    if producer is not None and len(list(producer.outputs[0].uses())) > 1:
        raise SchemeError(
            f"{producer.metadata_props[QUANTIZED]} is embedding and head at once, and an adapter is for one of them",
            hint="--tied untie",
        )
    return producer


def codes_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear behind a linear's weight, whoever else reads it; None where that is stored as floats."""
    weight = node.inputs[1]
    transpose = weight.producer() if weight is not None else None
    stored = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else weight
    producer = stored.producer() if stored is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or QUANTIZED not in producer.metadata_props:
        return None
    return producer


def lazy_of(dequantize: ir.Node) -> LazyQuantized:
    """The lazy weight that a DequantizeLinear reads."""
    quantized = quantized_of(dequantize.inputs[0])
    assert quantized is not None
    return quantized


def updated(name: str, base: LazyQuantized, update: Update) -> LazyQuantized:
    """A linear's weight with an update on it. Raises InputError or SchemeError, naming the linear, if it cannot be."""
    if any(base.updates):
        raise SchemeError(f"{name} holds another adapter already", hint="add the factors of both in one pass")
    try:
        return base.updated(update)
    except InputError as error:
        raise InputError(f"{name}: {error.message}", hint=error.hint) from error


def side_tensor(
    model: ir.Model,
    name: str,
    shape: tuple[int, int],
    value: Callable[[], F32],
    meta: object,
    base: LazyQuantized | None,
) -> ir.Value:
    """Register a lazy factor of a side path; `meta`: what packing needs of it, `base`: the weight it is made with."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(value(), np.float32), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
    )
    tensor.meta[ADAPTER] = meta
    if base is not None:
        tensor.meta[QUANTIZED] = base
    return lazy_initializer(model, name, tensor)


def product(x: ir.Value, factor: ir.Value, scope: str, mark: str, names: str) -> ir.Node:
    """x · factor, marked."""
    node = ir.node("MatMul", [x, factor], name=f"{scope}/MatMul", metadata_props={mark: names})
    output = node.outputs[0]
    output.name, output.type = f"{scope}.product", ir.TensorType(ir.DataType.FLOAT)
    return node


def join(linear: ir.Node, nodes: list[ir.Node], side: ir.Value, scope: str) -> None:
    """y ← y + side, behind the linear and its bias, with `nodes` in front of the Add. Users of y read the sum."""
    last = bias_add(linear) or linear
    while (behind := _joined(last)) is not None:
        last = behind
    y = last.outputs[0]
    add = ir.node("Add", [y, side], name=f"{scope}/Add", metadata_props={JOIN: linear.metadata_props[LINEAR]})
    output = add.outputs[0]
    output.name, output.shape, output.type = f"{scope}.joined", y.shape, ir.TensorType(ir.DataType.FLOAT)
    insert_after(last, [*nodes, add])
    replace_uses(y, output, keep=[add])


def _joined(node: ir.Node) -> ir.Node | None:
    """The Add of another side path onto what this node gives, if there is one."""
    return next((user for user, _ in node.outputs[0].uses() if JOIN in user.metadata_props), None)


def readers(source: ir.Value, names: set[str]) -> Iterator[ir.Node]:
    """The nodes with which side paths of these linears begin at x."""
    for user, _ in list(source.uses()):
        marked = user.metadata_props.get(BRANCH_A) or user.metadata_props.get(SUMS)
        if marked is not None and names & set(marked.split("+")):
            yield user
