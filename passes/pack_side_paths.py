"""Pack side paths: one product for all that reads x, and one sum on a packed projection instead of one on each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rqc.models.quantized import LazyQuantized
from rqc.passes.base import (
    BRANCH_A,
    BRANCH_B,
    JOIN,
    LINEAR,
    OFFSET,
    QUANTIZED,
    Pass,
    discard,
    initializer,
    insert_before,
    linears,
    replace_uses,
    sizes,
)
from rqc.passes.branches import Branch, branches_of
from rqc.passes.quantize import quantized_of
from rqc.passes.side_paths import F32, codes_of, product, side_tensor
from rqc.passes.zero_points import offset_tensor

MOST_ZEROS = 128 << 10
"""Bytes of zeros up to which one block-diagonal product is better than one product for each part and a Concat.

A row costs memory traffic above all. ONNX Runtime 1.31 on 2 quiet cores, rank 16, one row, diagonal against apart:
q, k, v of 576 inputs (120 KiB of zeros) 29 against 34 µs, gate and up (192 KiB) 36 against 35; q, k, v of 2048 inputs
(384 KiB) 47 to 66 against 56 to 61, gate and up (704 KiB) 134 against 53. At 128 rows the two are within noise.
"""


class PackSidePaths(Pass):
    """[q, k, v] + [x A₁ᵀ, x A₂ᵀ, …] diag(B₁ᵀ, B₂ᵀ, …), and [q, k, v] + P_g(x) [corr₁, …]ᵀ, in front of the Split.

    Products x Aᵀ that read the same x become one, also where the linears themselves stay apart (experts).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            packed = _Packed.of(node)
            if packed is not None:
                modified |= _hoist(model, packed)
        modified |= _stack_products(model)
        if modified:
            model.graph.sort()  # stable: only what a Split now waits for moves
            _group_tensors(model)
        return ir.passes.PassResult(model, modified=modified)


@dataclass(frozen=True, eq=False)
class _Packed:
    """A packed projection: its MatMulNBits, the Split behind it, and first column and width of each part by name."""

    linear: ir.Node
    split: ir.Node
    columns: dict[str, slice]

    @classmethod
    def of(cls, split: ir.Node) -> _Packed | None:
        """The projection that a Split takes apart, if it is one."""
        linear = split.inputs[0].producer() if split.op_type == "Split" and split.inputs[0] is not None else None
        names = [] if linear is None else linear.metadata_props.get(LINEAR, "").split("+")
        lengths = split.inputs[1].const_value if len(names) > 1 and split.inputs[1] is not None else None
        if linear is None or lengths is None:
            return None
        ends = np.cumsum(lengths.numpy()).tolist()
        return cls(linear, split, {name: slice(a, b) for name, a, b in zip(names, [0, *ends], ends, strict=False)})

    @property
    def x(self) -> ir.Value:
        """What it reads."""
        value = self.linear.inputs[0]
        assert value is not None
        return value

    @property
    def width(self) -> int:
        """Columns of all parts."""
        return sum(rows.stop - rows.start for rows in self.columns.values())

    @property
    def scope(self) -> str:
        """Its name without the operator."""
        return (self.linear.name or "").removesuffix("/MatMulNBits")

    def quantized(self) -> LazyQuantized:
        """The stacked weight."""
        found = quantized_of(self.linear.inputs[1])
        assert found is not None
        return found

    def join(self, nodes: Sequence[ir.Node], side: ir.Value, scope: str) -> None:
        """Let the Split read y + side instead of y, with `nodes` in front of the Add."""
        y = self.split.inputs[0]
        assert y is not None
        add = ir.node("Add", [y, side], name=f"{scope}/Add", metadata_props={JOIN: self.linear.metadata_props[LINEAR]})
        output = add.outputs[0]
        output.name, output.shape, output.type = f"{scope}.joined", y.shape, ir.TensorType(ir.DataType.FLOAT)
        insert_before(self.split, [*nodes, add])
        self.split.replace_input_with(0, output)


def _hoist(model: ir.Model, packed: _Packed) -> bool:
    """Move the side paths of a packed projection's parts in front of its Split."""
    joins = {name: _joins(part) for name, part in zip(packed.columns, packed.split.outputs, strict=True)}
    if not any(joins.values()):
        return False
    corrections = [node for adds in joins.values() for add in adds if OFFSET in (node := _addend(add)).metadata_props]
    ups = {
        name: node for name, adds in joins.items() for add in adds if BRANCH_B in (node := _addend(add)).metadata_props
    }
    for adds in joins.values():
        for add in adds:
            replace_uses(add.outputs[0], _input(add, 0))
            model.graph.remove(add, safe=True)
    if corrections:
        _hoist_corrections(model, packed, corrections)
    if ups:
        _hoist_branches(model, packed, ups)
    return True


def _joins(value: ir.Value) -> list[ir.Node]:
    """The Adds of side paths onto a value, one behind the other."""
    found: list[ir.Node] = []
    while (add := next((user for user, _ in value.uses() if JOIN in user.metadata_props), None)) is not None:
        found.append(add)
        value = add.outputs[0]
    return found


def _hoist_corrections(model: ir.Model, packed: _Packed, corrections: Sequence[ir.Node]) -> None:
    """One product of the block sums that all of them read, with the corrections of all rows."""
    scope = f"{packed.scope}/correction"
    factor = offset_tensor(model, f"{packed.scope}.correction", packed.quantized())
    node = product(_input(corrections[0], 0), factor, scope, OFFSET, packed.linear.metadata_props[LINEAR])
    packed.join([node], node.outputs[0], scope)
    for old in corrections:
        _drop(model, old)


def _hoist_branches(model: ir.Model, packed: _Packed, ups: dict[str, ir.Node]) -> None:
    """x [A₁ᵀ, A₂ᵀ, …], then a block-diagonal product, or one for each part where its zeros would be too many."""
    downs = [_producer(up) for up in ups.values()]
    stack = packed.quantized()
    branches = {name: _rebased(branches_of(up)[0], stack, packed.columns[name].start) for name, up in ups.items()}
    scope = f"{packed.scope}/branch"
    down = _stacked(model, packed.x, list(branches.items()), f"{packed.scope}.branch_a", f"{scope}/a")
    full = sum(branch.delta.rank for branch in branches.values()) * packed.width
    zeros = 4 * (full - sum(branch.delta.rank * branch.rows for branch in branches.values()))
    coded = any(branch.coded for branch in branches.values())  # blocks of codes would reach into two parts
    if len(branches) == 1 or (zeros <= MOST_ZEROS and not coded):
        names = packed.linear.metadata_props[LINEAR]
        columns = slice(0, packed.width)
        up = _up(model, down.outputs[0], branches, packed, columns, f"{packed.scope}.branch_b", f"{scope}/b", names)
        nodes = [up]
    else:
        nodes = _parted(model, down.outputs[0], branches, packed, scope)
    packed.join([down, *nodes], nodes[-1].outputs[0], scope)
    for old in [*ups.values(), *downs]:
        _drop(model, old)


def _parted(model: ir.Model, t: ir.Value, branches: dict[str, Branch], packed: _Packed, scope: str) -> list[ir.Node]:
    """Split t by ranks, one product for each part, Concat; parts without a branch are zero columns of the one before
    (the first of the one behind)."""
    parts = _split_ranks(model, t, [branch.delta.rank for branch in branches.values()], scope)
    starts = [packed.columns[name].start for name in branches]
    bounds = [0, *starts[1:], packed.width]
    nodes: list[ir.Node] = [parts]
    ups = []
    for index, (name, branch) in enumerate(branches.items()):
        columns = slice(bounds[index], bounds[index + 1])
        names = "+".join(part for part, rows in packed.columns.items() if columns.start <= rows.start < columns.stop)
        stem = f"{packed.scope}.branch_b{index}"
        ups.append(_up(model, parts.outputs[index], {name: branch}, packed, columns, stem, f"{scope}/b{index}", names))
    concat = ir.node("Concat", [up.outputs[0] for up in ups], attributes={"axis": -1}, name=f"{scope}/Concat")
    concat.outputs[0].name, concat.outputs[0].type = f"{scope}.concat", ir.TensorType(ir.DataType.FLOAT)
    return [*nodes, *ups, concat]


def _up(
    model: ir.Model,
    t: ir.Value,
    branches: dict[str, Branch],
    packed: _Packed,
    columns: slice,
    name: str,
    scope: str,
    names: str,
) -> ir.Node:
    """t times the B's of `branches`, block-diagonal on these columns of the projection."""
    ranks = [branch.delta.rank for branch in branches.values()]
    shape = (sum(ranks), columns.stop - columns.start)

    def value() -> F32:
        matrix = np.zeros(shape, np.float32)
        first = 0
        for part, branch in branches.items():
            start = packed.columns[part].start - columns.start
            matrix[first : first + branch.delta.rank, start : start + branch.rows] = branch.b()
            first += branch.delta.rank
        return matrix

    scaled = next((branch.base for branch in branches.values() if branch.base is not None), None)
    factor = side_tensor(model, name, shape, value, tuple(branches.values()), scaled)
    return product(t, factor, scope, BRANCH_B, names)


def _rebased(branch: Branch, stack: LazyQuantized, first_row: int) -> Branch:
    """The branch beside rows of a stacked weight."""
    return branch if branch.base is None else replace(branch, base=stack, first_row=first_row)


def _stacked(model: ir.Model, x: ir.Value, branches: Sequence[tuple[str, Branch]], name: str, scope: str) -> ir.Node:
    """x [A₁ᵀ, A₂ᵀ, …]."""
    every = [branch for _, branch in branches]
    shape = (every[0].delta.shape[1], sum(branch.delta.rank for branch in every))

    def value() -> F32:
        return np.concatenate([branch.a() for branch in every], axis=1)

    factor = side_tensor(model, name, shape, value, tuple(every), None)
    return product(x, factor, scope, BRANCH_A, "+".join(part for part, _ in branches))


def _split_ranks(model: ir.Model, t: ir.Value, ranks: Sequence[int], scope: str) -> ir.Node:
    lengths = initializer(model, "rqc.split." + "_".join(map(str, ranks)), np.asarray(ranks, np.int64))
    node = ir.node("Split", [t, lengths], attributes={"axis": -1}, num_outputs=len(ranks), name=f"{scope}/Split")
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"{scope}.ranks{index}", ir.TensorType(ir.DataType.FLOAT)
    return node


def _stack_products(model: ir.Model) -> bool:
    """One x Aᵀ for all branches that read the same x, whose linears stay apart: experts, or q, k and v in float.

    Linears in blocks and in float are kept apart: what the former read may be rounded later.
    """
    blocks = {
        name
        for label, node in linears(model)
        if node.op_type == "MatMulNBits" or codes_of(node) is not None
        for name in label.split("+")
    }
    found: dict[tuple[ir.Value, bool], list[ir.Node]] = {}
    for node in model.graph:
        names = node.metadata_props.get(BRANCH_A)
        if names is not None and node.op_type == "MatMul":
            found.setdefault((_input(node, 0), names.split("+")[0] in blocks), []).append(node)
    groups = [nodes for nodes in found.values() if len(nodes) > 1]
    for nodes in groups:
        _stack(model, nodes)
    return bool(groups)


def _stack(model: ir.Model, nodes: list[ir.Node]) -> None:
    branches = [
        pair for node in nodes for pair in zip(node.metadata_props[BRANCH_A].split("+"), branches_of(node), strict=True)
    ]
    stem = branches[0][0].removesuffix(".weight")
    down = _stacked(model, _input(nodes[0], 0), branches, f"{stem}.branches_a", f"{stem}/branches/a")
    ranks = [sizes(node.inputs[1])[1] for node in nodes]
    split = _split_ranks(model, down.outputs[0], ranks, f"{stem}/branches")
    insert_before(nodes[0], [down, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        replace_uses(node.outputs[0], part)
        _drop(model, node)


def _addend(add: ir.Node) -> ir.Node:
    """The node that gives what an Add of a side path adds."""
    node = _input(add, 1).producer()
    assert node is not None
    return node


def _producer(up: ir.Node) -> ir.Node:
    """The x Aᵀ in front of a t Bᵀ."""
    node = _input(up, 0).producer()
    assert node is not None
    return node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _drop(model: ir.Model, node: ir.Node) -> None:
    inputs = list(node.inputs[1:])
    model.graph.remove(node, safe=True)
    discard(model, inputs)


def _group_tensors(model: ir.Model) -> None:
    """Put tensors that come from one quantized weight side by side: it is computed once when they are written."""
    tensors = model.graph.initializers
    owners: dict[object, list[ir.Value]] = {}
    for name, value in list(tensors.items()):
        meta = {} if value.const_value is None else value.const_value.meta
        owners.setdefault(id(meta[QUANTIZED]) if QUANTIZED in meta else name, []).append(value)
        del tensors[name]
    for values in owners.values():
        for value in values:
            model.graph.register_initializer(value)
