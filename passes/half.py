"""Store float weights as fp16."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.models.weights import Weight
from rqc.passes.base import WEIGHT, Pass, insert_before, weight_of


class StoreHalf(Pass):
    """W ← fp16(W), cast back to float32 in front of its reader: half the file, float32 arithmetic."""

    exact = False

    def __init__(self, tables: Mapping[str, int], *, rest: bool) -> None:
        """tables: the wanted bits of embedding and head by parameter name, 16 for those to store so; rest: whether all
        other weights are stored so too."""
        super().__init__()
        self.tables = dict(tables)
        self.rest = rest

    @property
    def detail(self) -> str:
        """What is stored so."""
        chosen = [name.split(".")[-2] for name, bits in self.tables.items() if bits == 16]
        return ", ".join([*chosen, *(["all linears"] if self.rest else [])])

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for name, value in list(model.graph.initializers.items()):
            weight = weight_of(value)
            chosen = self.tables[name] == 16 if name in self.tables else self.rest
            if weight is None or len(weight.shape) < 2 or not chosen:
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
        lambda: ir.Tensor(_cast(weight)),
        dtype=ir.DataType.FLOAT16,
        shape=ir.Shape(weight.shape),
        name=name,
    )
    tensor.meta[WEIGHT] = weight
    return tensor


def _cast(weight: Weight) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # told by `finite`
        return weight.finite(weight.float32().astype(np.float16))
