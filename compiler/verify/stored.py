"""The weights that an engine holds, read back from the file: what its nodes compute with, however it is packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.verify.stored_codes import BLOCK_OPS, StoredPlane, dequantize_of, padding_of
from rqc.models.description import EMBEDDING
from rqc.models.packing import U8, Quantized
from rqc.passes.base import JOIN, LINEAR
from rqc.passes.pack import bias_add
from rqc.runtime.backends.graph_io import GATES
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError

HINT = "compile the engine again"


@dataclass(frozen=True, eq=False)
class StoredLinear:
    """One linear (or the embedding) of an engine: the parameters stacked in it, and the nodes that compute it.

    Several nodes are the planes of one weight, whose outputs are added.
    """

    names: tuple[str, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def quantized(self) -> bool:
        """Whether its weight is stored as codes."""
        return self.nodes[0].op_type in BLOCK_OPS or dequantize_of(self.nodes[0]) is not None

    @property
    def label(self) -> str:
        """What reports call it: the manifest's name."""
        return "+".join(self.names)

    @property
    def input(self) -> ir.Value:
        """x, as the kernel gets it but for zeros that fill blocks (token ids for the embedding)."""
        node = self.nodes[0]
        value = node.inputs[1] if self.names == (EMBEDDING,) else (padding_of(node) or node).inputs[0]
        assert value is not None
        return value

    @property
    def outputs(self) -> list[ir.Value]:
        """Values whose sum is y = x Wᵀ + b: one for each plane (what adds them may be fused with what follows)."""
        return [(bias_add(node) or node).outputs[0] for node in self.nodes]

    @property
    def joined(self) -> ir.Value | None:
        """y with what an adapter adds to it, if it adds something and the sum is a value of the graph."""
        graph, label = self.nodes[0].graph, self.nodes[0].metadata_props.get(LINEAR)
        last = None
        for node in graph or ():  # in order: each Add is behind the one that it adds to
            if label is not None and node.metadata_props.get(JOIN) == label and node.op_type == "Add":
                last = node.outputs[0]
        return last


@dataclass(frozen=True, eq=False)
class StoredGraph:
    """An engine's graph with the weights still in the file, and its linears by the names of the manifest."""

    file: EngineFile
    model: ir.Model
    linears: Mapping[str, StoredLinear]

    @classmethod
    def read(cls, file: EngineFile, adapter: str | None = None) -> StoredGraph:
        """Find every linear of an engine, with one of its adapters switched on for good, or none.

        Raises EngineFormatError if its graph has no embedding.
        """
        model = ir.serde.deserialize_model(onnx.load_model_from_string(file.graph()))
        _switch(model, [float(name == adapter) for name in (file.manifest["adapter"] or {}).get("names", [])])
        found: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            if name := node.metadata_props.get(LINEAR):
                found.setdefault(name, []).append(node)
            elif node.op_type == "GatherBlockQuantized" or (node.op_type == "Gather" and _table(node) is not None):
                found.setdefault(EMBEDDING, []).append(node)
        if EMBEDDING not in found:
            raise EngineFormatError(f"{file.path}: the graph has no embedding", hint=HINT)
        linears = {name: StoredLinear(tuple(name.split("+")), tuple(nodes)) for name, nodes in found.items()}
        return cls(file, model, linears)

    def quantized(self, linear: StoredLinear, bits: int) -> Quantized:
        """Codes, scales and zero points of a linear in blocks, its planes put together; bits: the width of its grid."""
        block = self.block(linear)
        planes = [StoredPlane(node, bits, block, self.array).quantized() for node in linear.nodes]
        if len(planes) == 1:
            return planes[0]
        high, low = sorted(planes, key=lambda plane: -float(np.abs(plane.scales).sum()))
        if not np.array_equal(high.scales, 16 * low.scales):
            raise EngineFormatError(f"{linear.label}: its two planes do not fit together", hint=HINT)
        codes, zeros = 16 * high.codes + low.codes, 16 * _zeros(high) + _zeros(low)
        return Quantized(codes, low.scales, zeros, bits, 8, low.block_size)

    def block(self, linear: StoredLinear) -> int:
        """Inputs that share a scale or a zero point, of a linear whose weight is stored as codes."""
        attribute = linear.nodes[0].attributes.get("block_size")
        if attribute is not None:
            return attribute.as_int()
        rows = self.file.manifest["layers"]
        return next(int(row["block_size"]) for row in rows if row["name"] == linear.label)

    def floats(self, linear: StoredLinear) -> NDArray[np.generic]:
        """The weight [out, in] of a linear that is stored as floats, in the type of the file."""
        node = linear.nodes[0]
        value = node.inputs[0 if linear.names == (EMBEDDING,) else 1]
        producer = value.producer() if value is not None else None
        stored = self.array(producer.inputs[0] if producer is not None else value)
        transposed = node.op_type == "MatMul" and (producer is None or producer.op_type != "Transpose")
        return stored.T if transposed else stored

    def array(self, value: ir.Value | None) -> NDArray[np.generic]:
        """An initializer's values, from the mapped file or, if it is small, from the graph."""
        assert value is not None
        if value.name in self.file.tensors:
            stored = self.file.tensor(value.name)
            return stored.view(ml_dtypes.bfloat16) if value.dtype == ir.DataType.BFLOAT16 else stored
        if value.const_value is None:
            raise EngineFormatError(f"{self.file.path}: {value.name} is no stored tensor", hint=HINT)
        return value.const_value.numpy()


def _switch(model: ir.Model, gates: Sequence[float]) -> None:
    """Make a constant of the input that switches adapters, if the graph has it."""
    for value in [value for value in model.graph.inputs if value.name == GATES]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray([gates], np.float32), name=GATES)
        model.graph.register_initializer(value)


def _zeros(plane: Quantized) -> U8:
    """The zero points of a plane, which always has some."""
    assert plane.zero_points is not None
    return plane.zero_points


def _table(node: ir.Node) -> ir.Value | None:
    """The initializer that a Gather takes the embedding's rows from, maybe through a Cast or a DequantizeLinear; None
    for other gathers."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    behind = producer is not None and producer.op_type in ("Cast", "DequantizeLinear")
    source = producer.inputs[0] if producer is not None and behind else value
    return source if source is not None and (source.name or "").startswith(EMBEDDING) else None
