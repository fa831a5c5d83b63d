"""What every pass shares: the contract, the marks on nodes, and small moves on the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rqc.models.delta import Delta
from rqc.models.weights import Weight

LINEAR = "rqc.linear"
"""Mark on a node: the parameter name of the linear that it computes."""
ONLINE = "rqc.online"
"""Mark on a node: the rotation site (r1, r3, r4) whose online half it belongs to."""
BRANCH_A = "rqc.branch.a"
"""Mark on the product t = x A [in, R] of a low-rank branch: the names of the linears whose ranks it holds, stacked in
that order, joined by +."""
BRANCH_B = "rqc.branch.b"
"""Mark on a product t B [r, N] of a low-rank branch, scale folded in: the names of the linears whose outputs its
columns are, in that order, joined by +."""
OFFSET = "rqc.offset"
"""Mark on the product P_g(x) corr [G, N] that is left of a zero-point merge: names as for BRANCH_B."""
SUMS = "rqc.sums"
"""Mark on the nodes of the block sums P_g(x): the names of the linears whose corrections read them, joined by +."""
JOIN = "rqc.join"
"""Mark on the Add of a side path (a branch or a correction) onto y: the names of the linears that it belongs to."""
PADDED = "rqc.padded"
"""Mark on the Pad that fills x up to whole blocks of the weights that read it: by how many zeros."""
CLIP = "rqc.clip"
"""Mark on a linear: the ratio by which the range of its input is clipped where activations are rounded per token."""
GATE = "rqc.gate"
"""Mark on what switches branches: on the Mul t ⊙ G, the names of BRANCH_A; on the Gather that gives G, "ranks"."""
WEIGHT = "rqc.weight"
"""Key in a tensor's meta: the lazy `Weight` behind it."""
QUANTIZED = "rqc.quantized"
"""Key in a tensor's meta: the lazy quantized weight behind it."""
ADAPTER = "rqc.adapter"
"""Key in a tensor's meta: what an adapter keeps beside a weight; tensors that have it count as weights."""
WIDE = "rqc.wide"
"""Mark on a node: it computes in float32, whatever the type of the graph's floats."""
LATE = "rqc.late"
"""Key in a tensor's meta: it lies with the weights, small as it is, so that it is evaluated with its neighbours."""
STORAGE = "rqc.storage"
"""Key in a tensor's meta: tensors with equal storage share their bytes in the engine."""


class Pass(ir.passes.InPlacePass):
    """A pass over one graph.

    `exact`: the function of the graph does not change; `--verify-each` fails the pass by name if it does. Every pass is
    idempotent.
    """

    exact: bool = True

    @property
    def label(self) -> str:
        """The name that progress lines, dumps and reports use."""
        return type(self).__name__

    @property
    def detail(self) -> str:
        """The parameters of the pass, for progress lines and dry runs; nothing for a pass without any."""
        return ""


class AdapterPass(Pass):
    """A pass that puts an adapter's updates, by parameter name, into a graph: the function changes, on purpose."""

    exact = False

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__()
        self.deltas = dict(deltas)

    @property
    def detail(self) -> str:
        """How many linears, and the largest rank."""
        rank = max((delta.rank for delta in self.deltas.values()), default=0)
        return f"{len(self.deltas)} linears, rank {rank}"


def set_weight(value: ir.Value, weight: Weight) -> None:
    """Make `weight` the lazy value (float32) of an initializer."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(weight.float32(), name=value.name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(weight.shape),
        name=value.name,
    )
    tensor.meta[WEIGHT] = weight
    value.const_value = tensor
    value.shape = ir.Shape(weight.shape)
    value.type = ir.TensorType(ir.DataType.FLOAT)


def weight_of(value: ir.Value | None) -> Weight | None:
    """The lazy weight of an initializer, or None."""
    if value is None or value.const_value is None:
        return None
    found = value.const_value.meta.get(WEIGHT)
    return found if isinstance(found, Weight) else None


def linears(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """(parameter name, node) of every marked linear, in graph order."""
    for node in list(model.graph):
        name = node.metadata_props.get(LINEAR)
        if name is not None:
            yield name, node


def initializer(model: ir.Model, name: str, array: npt.ArrayLike) -> ir.Value:
    """The initializer of that name, made from `array` if it is not there yet: constants are shared by name."""
    existing = model.graph.initializers.get(name)
    if existing is not None:
        return existing
    return lazy_initializer(model, name, ir.Tensor(np.asarray(array, order="C"), name=name))


def lazy_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor, lazy or not, as an initializer."""
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def sizes(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of a value; -1 where a dimension is symbolic, () where nothing is known."""
    if value is None or value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def discard(model: ir.Model, values: Iterable[ir.Value | None]) -> None:
    """Remove initializers that nothing reads any more."""
    for value in values:
        if value is not None and not value.uses() and (value.name or "") in model.graph.initializers:
            del model.graph.initializers[value.name or ""]


def insert_before(anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes, in order, before `anchor`."""
    graph = anchor.graph
    assert graph is not None
    graph.insert_before(anchor, nodes)


def insert_after(anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes, in order, after `anchor`."""
    graph = anchor.graph
    assert graph is not None
    graph.insert_after(anchor, nodes)


def replace_uses(old: ir.Value, new: ir.Value, keep: Sequence[ir.Node] = ()) -> None:
    """Let every user of `old` but the nodes in `keep` read `new`; a graph output moves along and keeps its name."""
    for user, index in list(old.uses()):
        if user not in keep:
            user.replace_input_with(index, new)
    graph = new.producer().graph if new.producer() is not None else None  # type: ignore[union-attr]
    if graph is None or old not in graph.outputs:
        return
    outputs = list(graph.outputs)
    name = old.name
    old.name, new.name = f"{name}.before", name
    new.shape, new.type = new.shape or old.shape, new.type or old.type
    graph.outputs[outputs.index(old)] = new


def constant(model: ir.Model, name: str, values: Sequence[int]) -> ir.Value:
    """A small shared int64 constant."""
    return initializer(model, name, np.asarray(values, np.int64))
