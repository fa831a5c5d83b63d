"""An online rotation as plain ONNX: x → x Q in Kronecker factors, two small MatMuls and two Reshapes, never one n × n
product."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from rqc.models.rotation import Orthogonal
from rqc.passes.base import ONLINE, constant, initializer


@dataclass
class OnlineRotation:
    """Builds the nodes of x Q (or x Qᵀ) on the last axis of a [batch, sequence, n] value.

    For x reshaped to [.., repeat, a, b] and Q = diag(s)(I ⊗ A ⊗ B): x Q = Aᵀ (s x) B and x Qᵀ = s (A x Bᵀ).
    The constants are shared by all nodes that use the same factor.
    """

    model: ir.Model
    rotation: Orthogonal
    site: str
    inverse: bool = False
    nodes: list[ir.Node] = field(default_factory=list)

    def build(self, x: ir.Value, scope: str) -> ir.Value:
        """Append the nodes to `self.nodes` and return x Q (x Qᵀ if inverse)."""
        self.scope = scope
        if not self.inverse:
            x = self._signs(x)
        x = self._op("Reshape", x, constant(self.model, self._shape_name(), [0, 0, *self._dims()]))
        x = self._factors(x)
        x = self._op("Reshape", x, constant(self.model, "rqc.flat", [0, 0, -1]))
        return self._signs(x) if self.inverse else x

    def _dims(self) -> list[int]:
        sizes = [len(factor) for factor in self.rotation.factors]
        return ([self.rotation.repeat] if self.rotation.repeat > 1 else []) + sizes

    def _shape_name(self) -> str:
        return "rqc.shape." + "x".join(str(size) for size in self._dims())

    def _factors(self, x: ir.Value) -> ir.Value:
        *left, last = self.rotation.factors
        x = self._op("MatMul", x, self._matrix(last.T if self.inverse else last))
        if left:
            (first,) = left
            x = self._op("MatMul", self._matrix(first if self.inverse else first.T), x)
        return x

    def _matrix(self, matrix: np.ndarray) -> ir.Value:
        array = np.ascontiguousarray(matrix, np.float32)
        return initializer(self.model, f"rqc.factor.{_digest(array)}", array)

    def _signs(self, x: ir.Value) -> ir.Value:
        if self.rotation.signs is None:
            return x
        array = np.asarray(self.rotation.signs, np.float32)
        return self._op("Mul", x, initializer(self.model, f"rqc.signs.{_digest(array)}", array))

    def _op(self, kind: str, *inputs: ir.Value) -> ir.Value:
        index = len(self.nodes)
        node = ir.node(
            kind, list(inputs), name=f"{self.scope}/{self.site}/{kind}_{index}", metadata_props={ONLINE: self.site}
        )
        node.outputs[0].name = f"{self.scope}.{self.site}.{index}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs[0]


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:12]
