"""What an engine computes beside its linears, read back from the file: branches and corrections, of an adapter or its
own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.verify.stored import HINT, StoredGraph
from rqc.compiler.verify.stored_codes import StoredPlane
from rqc.passes.accumulation import ACCURACY_INT8
from rqc.passes.base import BRANCH_A, BRANCH_B, GATE, OFFSET
from rqc.runtime.errors import EngineFormatError

F64 = NDArray[np.float64]
Stored = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class StoredBranch:
    """t = x aᵀ, then t bᵀ: a [r, in], b [out, r]. blocks: inputs that share a scale where the kernel rounds x to int8,
    and where it rounds t; None where it multiplies floats, as with an `a` that a branch of floats shares."""

    a: Stored
    b: Stored
    blocks: tuple[int | None, int | None] = (None, None)

    def dense(self) -> F64:
        """b a [out, in]."""
        return np.asarray(self.b.astype(np.float64) @ self.a.astype(np.float64))


@dataclass(frozen=True, eq=False)
class StoredSide:
    """All that an engine adds to one linear's output: y += Σ (x aᵀ) bᵀ + Σ P_g(x) cᵀ.

    corrections: c [out, G], for block sums of x.
    """

    branches: tuple[StoredBranch, ...] = ()
    corrections: tuple[Stored, ...] = ()

    def branch(self, shape: tuple[int, int]) -> F64:
        """The branches as one matrix [out, in]."""
        return sum((branch.dense() for branch in self.branches), np.zeros(shape))

    @property
    def rounded(self) -> tuple[StoredBranch, ...]:
        """The branches with a kernel that rounds what it reads."""
        return tuple(branch for branch in self.branches if any(branch.blocks))

    def exact(self) -> StoredSide:
        """The same without those."""
        return StoredSide(tuple(branch for branch in self.branches if not any(branch.blocks)), self.corrections)

    def correction(self, shape: tuple[int, int]) -> F64:
        """The corrections as one matrix [out, G]."""
        return sum((c.astype(np.float64) for c in self.corrections), np.zeros(shape))

    def dense(self, shape: tuple[int, int], block: int) -> F64:
        """Everything as one matrix [out, in], for blocks of that size."""
        groups = -(-shape[1] // block)
        return self.branch(shape) + np.repeat(self.correction((shape[0], groups)), block, axis=1)[:, : shape[1]]


def read_sides(stored: StoredGraph, rows: Mapping[str, int]) -> dict[str, StoredSide]:
    """The side paths of an engine by the weight that they run beside; rows: outputs of each weight.

    Raises EngineFormatError for marks that do not fit together.
    """
    sides: dict[str, StoredSide] = {}
    for node in stored.model.graph:
        names = node.metadata_props.get(BRANCH_B) or node.metadata_props.get(OFFSET)
        if not names:
            continue
        branch = branch_of(stored, node) if BRANCH_B in node.metadata_props else None
        factor = _factor(stored, node) if branch is None else branch.b
        start = 0
        for name in names.split("+"):
            part = factor[start : start + rows.get(name, 0)]
            start += len(part)
            known = sides.get(name, StoredSide())
            if branch is None:
                sides[name] = StoredSide(known.branches, (*known.corrections, part))
            else:
                own = replace(branch, b=part)
                sides[name] = StoredSide((*known.branches, own), known.corrections)
        if start != len(factor):
            raise EngineFormatError(
                f"{stored.file.path}: {node.name} has {len(factor)} outputs, its linears have {start}", hint=HINT
            )
    return sides


def branch_of(stored: StoredGraph, node: ir.Node) -> StoredBranch:
    """The branch that a second product ends, of all linears that it is for. Raises EngineFormatError if it is half of
    one."""
    a, down = _down(stored, node)
    return StoredBranch(a, _factor(stored, node), (_block(down), _block(node)))


def _factor(stored: StoredGraph, node: ir.Node) -> Stored:
    """The matrix [out, in] that a product multiplies with, stored as floats or as codes."""
    if node.op_type != "MatMulNBits":
        return stored.array(node.inputs[1]).T
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    return StoredPlane(node, bits, block, stored.array).quantized().dequantize()


def kernel_rounds(node: ir.Node) -> bool:
    """Whether a product's kernel rounds what it reads to int8."""
    level = node.attributes.get("accuracy_level")
    return level is not None and level.as_int() == ACCURACY_INT8


def _block(node: ir.Node) -> int | None:
    """The block in which a product's kernel rounds what it reads to int8; None where it doesn't."""
    return node.attributes["block_size"].as_int() if kernel_rounds(node) else None


def _down(stored: StoredGraph, node: ir.Node) -> tuple[Stored, ir.Node]:
    """The a [r, in] whose product a branch's second half reads: all ranks, or those that a Split gives it; each times
    its gate where adapters are switched. And the product, if it is of two planes one of them."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    ranks = slice(None)
    if producer is not None and producer.op_type == "Split":
        lengths = np.asarray(stored.array(producer.inputs[1]), np.int64)
        index = next(i for i, output in enumerate(producer.outputs) if output is value)
        first = int(lengths[:index].sum())
        ranks = slice(first, first + int(lengths[index]))
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    gates = np.ones(1, np.float32)
    if producer is not None and GATE in producer.metadata_props:
        gates = _gates(stored, producer.inputs[1])
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    planes = [producer]
    if producer is not None and producer.op_type == "Add":
        planes = [None if value is None else value.producer() for value in producer.inputs]
    products = [plane for plane in planes if plane is not None and BRANCH_A in plane.metadata_props]
    if len(products) != len(planes):
        raise EngineFormatError(f"{stored.file.path}: {node.name} is half of a branch", hint=HINT)
    whole = sum((np.asarray(_factor(stored, plane), np.float32) for plane in products), np.float32(0))
    return (whole * gates)[ranks], products[0]


def _gates(stored: StoredGraph, value: ir.Value | None) -> NDArray[np.float32]:
    """The gate [R, 1] of each rank: those of the adapters, gathered."""
    gather = value.producer() if value is not None else None
    rows = gather.inputs[0].producer() if gather is not None and gather.inputs[0] is not None else None
    if gather is None or rows is None:
        raise EngineFormatError(f"{stored.file.path}: a branch has no gates", hint=HINT)
    ranks = np.asarray(stored.array(gather.inputs[1]), np.int64)
    source = rows.inputs[0]
    cast = source.producer() if source is not None else None  # an input in float32 of a graph in half precision
    switched = stored.array(source if cast is None else cast.inputs[0])
    return np.asarray(switched[0][ranks], np.float32)[:, None]
