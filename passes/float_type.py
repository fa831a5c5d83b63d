"""Compute in half precision: one float type for the whole graph, as a strongly typed builder wants it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.passes.base import WIDE, Pass, insert_after
from rqc.passes.build import Builder
from rqc.runtime.errors import TargetError

FLOAT_TYPES: dict[str, tuple[ir.DataType, np.dtype[np.generic]]] = {
    "fp32": (ir.DataType.FLOAT, np.dtype(np.float32)),
    "fp16": (ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bf16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}


class CastFloats(Pass):
    """Every float value becomes fp16 (bf16): weights, scales, constants, activations and the cache.

    Logits leave as float32, and other float inputs than the cache come in as float32. Constants beyond the type's range
    that stand for −∞ (masks) become its lowest value. Nodes marked to be wide stay in float32, with a cast behind them.
    """

    exact = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.dtype, self.numpy = FLOAT_TYPES[name]

    @property
    def detail(self) -> str:
        """The type."""
        return self.name

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in model.graph.initializers.values():
            modified |= self._initializer(value)
        if not modified:
            return ir.passes.PassResult(model, modified=False)
        for node in list(model.graph):
            self._narrow(node) if WIDE in node.metadata_props else self._node(node)
        for value in model.graph.inputs:
            self._input(model, value)
        for index, value in enumerate(model.graph.outputs):
            if value.name == "logits":
                self._logits(model, index)
        return ir.passes.PassResult(model, modified=True)

    def _initializer(self, value: ir.Value) -> bool:
        old = value.const_value
        if old is None or old.dtype != ir.DataType.FLOAT or self.dtype == ir.DataType.FLOAT:
            return False
        if value.uses() and all(WIDE in user.metadata_props for user, _ in value.uses()):
            return False
        value.const_value = self._tensor(old)
        value.type = ir.TensorType(self.dtype)
        return True

    def _tensor(self, old: ir.TensorProtocol) -> ir.LazyTensor:
        name = old.name

        def cast() -> ir.Tensor[Any]:
            return ir.Tensor(self._cast(old.numpy(), name), dtype=self.dtype, name=name)

        tensor = ir.LazyTensor(cast, dtype=self.dtype, shape=ir.Shape(old.shape.numpy()), name=name)
        tensor.meta.update(old.meta)
        return tensor

    def _cast(self, array: NDArray[np.generic], name: str | None) -> NDArray[np.generic]:
        floats = np.asarray(array, np.float32)
        if array.ndim == 0 and floats < -1e30:
            lowest = ml_dtypes.finfo(self.numpy).min  # type: ignore[no-untyped-call]
            return np.asarray(lowest, self.numpy)
        with np.errstate(over="ignore"):  # told below
            cast = floats.astype(self.numpy)
        if not np.isfinite(cast.astype(np.float32)).all():
            raise TargetError(f"{name} has values beyond {self.name}", hint="--dtype bf16 or fp32")
        return cast

    def _node(self, node: ir.Node) -> None:
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
                node.attributes[key] = ir.AttrTensor(key, self._tensor(attribute.as_tensor()))
            elif key == "value_float":
                array = np.asarray(attribute.as_float(), np.float32)
                node.attributes.pop(key)
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(self._cast(array, node.name)))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", self.dtype)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.type = ir.TensorType(self.dtype)

    def _narrow(self, node: ir.Node) -> None:
        """Cast what a wide node gives to others."""
        (output,) = node.outputs
        users = [(user, index) for user, index in output.uses() if WIDE not in user.metadata_props]
        if users:
            cast = ir.node("Cast", [output], attributes={"to": self.dtype.value}, name=f"{node.name}/{self.name}")
            cast.outputs[0].name = f"{output.name}.{self.name}"
            cast.outputs[0].shape, cast.outputs[0].type = output.shape, ir.TensorType(self.dtype)
            insert_after(node, [cast])
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])

    def _input(self, model: ir.Model, value: ir.Value) -> None:
        if value.dtype != ir.DataType.FLOAT:
            return
        if (value.name or "").startswith("past_key_values."):
            value.type = ir.TensorType(self.dtype)
            return
        users = list(value.uses())
        first = min((user for user, _ in users), key=list(model.graph).index)
        cast = Builder(first, f"rqc/{value.name}").op("Cast", value, dtype=self.dtype, to=self.dtype.value)
        for user, index in users:
            user.replace_input_with(index, cast)

    def _logits(self, model: ir.Model, index: int) -> None:
        half = model.graph.outputs[index]
        producer = half.producer()
        assert producer is not None
        node = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT.value}, name="rqc/logits/Cast")
        insert_after(producer, [node])
        node.outputs[0].name, half.name = half.name, f"{half.name}.{self.name}"
        node.outputs[0].shape, node.outputs[0].type = half.shape, ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs[index] = node.outputs[0]
