"""The last steps for ONNX Runtime: float linears without a transposed copy, skip-norms, the head at chosen positions,
no dead parts."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from rqc.models.weights import Weight
from rqc.passes.base import ONLINE, WEIGHT, Pass, initializer, insert_before, linears, replace_uses, weight_of
from rqc.passes.pack import MICROSOFT
from rqc.passes.rotate import final_norm

POSITIONS = "logits_positions"
OPSET, IR_VERSION = 23, 10


class TransposeInKernel(Pass):
    """x (Wᵀ) with W as stored = FusedMatMul(x, W, transB): the runtime makes no transposed copy, a tied table stays
    one."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for _, node in linears(model):
            weight = node.inputs[1]
            transpose = weight.producer() if weight is not None else None
            if node.op_type != "MatMul" or transpose is None or transpose.op_type != "Transpose":
                continue
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
            fused = ir.node(
                "FusedMatMul",
                [node.inputs[0], transpose.inputs[0]],
                attributes={"transB": 1},
                domain=MICROSOFT,
                name=f"{node.name}/FusedMatMul",
                metadata_props=dict(node.metadata_props),
            )
            old, new = node.outputs[0], fused.outputs[0]
            new.name, new.shape, new.type = f"{old.name}.fused", old.shape, old.type
            insert_before(node, [fused])
            replace_uses(old, new)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


class StoreHalf(Pass):
    """W ← fp16(W), cast back to float32 in front of its reader: half the file, float32 arithmetic."""

    exact = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for name, value in list(model.graph.initializers.items()):
            weight = weight_of(value)
            if weight is None or len(weight.shape) < 2:
                continue
            half = ir.Value(name=f"{name}.half", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
            half.const_value = _half(weight, half.name)
            model.graph.register_initializer(half)
            cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}/Cast")
            cast.outputs[0].name, cast.outputs[0].shape = f"{name}.float", value.shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            users = list(value.uses())
            insert_before(min((user for user, _ in users), key=list(model.graph).index), [cast])
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])
            del model.graph.initializers[name]
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _half(weight: Weight, name: str | None) -> ir.LazyTensor:
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(weight.float32().astype(np.float16)),
        dtype=ir.DataType.FLOAT16,
        shape=ir.Shape(weight.shape),
        name=name,
    )
    tensor.meta[WEIGHT] = weight
    return tensor


class FuseSkipNorm(Pass):
    """s = a + b, RMSNorm(s; g) as one SkipSimplifiedLayerNormalization that returns both."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for norm in list(model.graph):
            source = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
            add = source.producer() if source is not None else None
            if add is None or add.op_type != "Add" or any(v is None or v.is_initializer() for v in add.inputs):
                continue
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
            fused = ir.node(
                "SkipSimplifiedLayerNormalization",
                [add.inputs[0], add.inputs[1], norm.inputs[1]],
                attributes={"epsilon": norm.attributes["epsilon"].as_float()},
                domain=MICROSOFT,
                num_outputs=4,
                name=f"{norm.name}/Skip",
            )
            for old, new in ((norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[3])):
                new.name, new.shape, new.type = f"{old.name}.fused", old.shape, old.type
            for unused in fused.outputs[1:3]:
                unused.name = ""
            insert_before(norm, [fused])
            replace_uses(add.outputs[0], fused.outputs[3], keep=[norm])
            replace_uses(norm.outputs[0], fused.outputs[0])
            model.graph.remove([norm, add], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


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


class RemoveDeadParts(Pass):
    """Nodes, initializers and inputs that nothing reads go; token ids stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = common.RemoveUnusedNodesPass()(model).modified
        for value in list(model.graph.inputs):
            if not value.uses() and value.name != "input_ids":
                model.graph.inputs.remove(value)
                modified = True
        for name, value in list(model.graph.initializers.items()):
            if not value.uses():
                del model.graph.initializers[name]
                modified = True
        return ir.passes.PassResult(model, modified=modified)


class StampOpset(Pass):
    """Declare the lowest opset and IR version that have these operators: runtimes for Python 3.10 read opset 23, not
    24.

    A node that uses what only opset 24 has (an input that its opset-23 schema lacks) keeps the graph at 24.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if model.graph.opset_imports[""] <= OPSET or not all(_known(node) for node in model.graph if not node.domain):
            return ir.passes.PassResult(model, modified=False)
        model.graph.opset_imports[""] = OPSET
        model.ir_version = IR_VERSION
        return ir.passes.PassResult(model, modified=True)


def _known(node: ir.Node) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return False
    return len(node.inputs) <= len(schema.inputs) or schema.max_input > len(schema.inputs)
