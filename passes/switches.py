"""Switch branches on and off at run time: one small input says how much of each adapter is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from rqc.passes.base import BRANCH_A, GATE, Pass, constant, initializer, insert_after, replace_uses, sizes
from rqc.runtime.backends.graph_io import GATES
from rqc.runtime.errors import UnsupportedModelError


class SwitchBranches(Pass):
    """t ← t ⊙ G with t = x Aᵀ and G [batch, 1, R] the gate of the adapter that each rank belongs to.

    The gates are the graph's input [batch, adapters] of floats: how much each row adds of each adapter, 1 or 0.

    names: the adapters; owners: by weight, the adapter (by number) of each rank of its branch. One Mul for each product
    x Aᵀ, one Gather for each layout of ranks. With every gate at 1 the function does not change; with all at 0 it is
    that of the model alone.
    """

    def __init__(self, names: Sequence[str], owners: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.owners = {name: tuple(ranks) for name, ranks in owners.items()}

    @property
    def detail(self) -> str:
        """The adapters."""
        return ", ".join(self.names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        products = [node for node in model.graph if BRANCH_A in node.metadata_props]
        open_ones = [
            node for node in products if not any(GATE in user.metadata_props for user, _ in node.outputs[0].uses())
        ]
        if not open_ones:
            return ir.passes.PassResult(model, modified=False)
        rows, nodes = self._rows(model)
        gathered: dict[tuple[int, ...], ir.Value] = {}
        for node in open_ones:
            if len(sizes(node.inputs[0])) not in (0, 3):
                raise UnsupportedModelError(
                    f"{node.name} reads tokens of all rows at once, so its adapters cannot be switched by row",
                    hint="compile an engine for each adapter, without names",
                )
            layout = tuple(owner for name in node.metadata_props[BRANCH_A].split("+") for owner in self.owners[name])
            if layout not in gathered:
                ranks = initializer(model, f"rqc.adapter_ranks.{len(gathered)}", np.asarray(layout, np.int64))
                gather = ir.node(
                    "Gather",
                    [rows, ranks],
                    attributes={"axis": 2},
                    name=f"adapters/ranks_{len(gathered)}",
                    metadata_props={GATE: "ranks"},
                )
                gathered[layout] = _named(gather, f"adapter_gates.{len(gathered)}")
                nodes.append(gather)
            _gate(node, gathered[layout])
        first = next(iter(model.graph))
        model.graph.insert_before(first, nodes)
        return ir.passes.PassResult(model, modified=True)

    def _rows(self, model: ir.Model) -> tuple[ir.Value, list[ir.Node]]:
        """The gates as [batch, 1, adapters], and the node that makes them so."""
        batch = next(value for value in model.graph.inputs if value.name == "input_ids").shape
        shape = ir.Shape([batch[0] if batch is not None else "batch", len(self.names)])
        gates = ir.Value(name=GATES, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.inputs.append(gates)
        node = ir.node("Unsqueeze", [gates, constant(model, "rqc.axis_1", [1])], name="adapters/rows")
        return _named(node, "adapter_gates.rows"), [node]


def _named(node: ir.Node, name: str) -> ir.Value:
    output = node.outputs[0]
    output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    return output


def _gate(node: ir.Node, gates: ir.Value) -> None:
    """t ← t ⊙ gates, behind the product."""
    t, scope = node.outputs[0], (node.name or "").removesuffix("/MatMul")
    mul = ir.node("Mul", [t, gates], name=f"{scope}/Mul", metadata_props={GATE: node.metadata_props[BRANCH_A]})
    replace_uses(t, _named(mul, f"{scope}.gated"), keep=[mul])
    insert_after(node, [mul])
