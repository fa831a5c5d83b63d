"""Building nodes in a row: what a pass inserts in front of a node of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rqc.passes.base import insert_before

Attribute = int | float | str | Sequence[int]


class Builder:
    """Inserts nodes in front of `anchor`, one after the other; `scope` names them and what they give."""

    def __init__(self, anchor: ir.Node, scope: str) -> None:
        self.anchor, self.scope, self.count = anchor, scope, 0

    def op(
        self, kind: str, *inputs: ir.Value | None, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: Attribute
    ) -> ir.Value:
        """The output, of type `dtype`, of a new node."""
        node = ir.node(kind, list(inputs), attributes=attributes, name=f"{self.scope}/{kind}_{self.count}")
        node.outputs[0].name, node.outputs[0].type = f"{self.scope}.{self.count}", ir.TensorType(dtype)
        insert_before(self.anchor, [node])
        self.count += 1
        return node.outputs[0]
