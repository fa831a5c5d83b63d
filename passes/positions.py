"""Compute logits only at the positions that are asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.passes.base import ONLINE, Pass, initializer, insert_before
from rqc.passes.rotate import final_norm

POSITIONS = "logits_positions"


class SelectPositions(Pass):
    """logits[b, i] = head(stream[b, positions[b, i]]): final norm and head run at the positions that are asked for, not
    at all."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if any(value.name == POSITIONS for value in model.graph.inputs):
            return ir.passes.PassResult(model, modified=False)
        positions = ir.Value(
            name=POSITIONS, shape=ir.Shape(["batch", "positions"]), type=ir.TensorType(ir.DataType.INT64)
        )
        model.graph.inputs.append(positions)
        node = final_norm(model)
        while (producer := _producer(node)) is not None and producer.metadata_props.get(ONLINE) == "r1":
            node = producer
        index = next(i for i, value in enumerate(node.inputs) if value is not None and not value.is_initializer())
        stream = node.inputs[index]
        assert stream is not None
        axis = initializer(model, "rqc.last_axis", np.asarray([-1], np.int64))
        indices = ir.node("Unsqueeze", [positions, axis], name="rqc/logits_positions/Unsqueeze")
        gather = ir.node(
            "GatherND", [stream, indices.outputs[0]], attributes={"batch_dims": 1}, name="rqc/logits_positions/GatherND"
        )
        indices.outputs[0].name, gather.outputs[0].name = "rqc.positions", "rqc.stream_at_positions"
        gather.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        insert_before(node, [indices, gather])
        node.replace_input_with(index, gather.outputs[0])
        _forget_shapes(model, gather)
        logits = model.graph.outputs[0]
        logits.shape = ir.Shape(["batch", "positions", (logits.shape or ir.Shape([None]))[-1]])
        return ir.passes.PassResult(model, modified=True)


def _forget_shapes(model: ir.Model, gather: ir.Node) -> None:
    """Behind the gather a value has as many rows as positions: shapes of [batch, sequence, …] no longer hold."""
    behind = {gather}
    for node in model.graph:
        if any(value is not None and value.producer() in behind for value in node.inputs):
            behind.add(node)
            for output in node.outputs:
                output.shape = None if not output.is_graph_output() else output.shape


def _producer(node: ir.Node) -> ir.Node | None:
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            return producer
    return None
