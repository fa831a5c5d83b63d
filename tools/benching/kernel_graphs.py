"""Graphs of linears alone, in the forms that ONNX Runtime's CPU has kernels for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rqc.models.grid import Grid, quantize
from rqc.models.grid import Quantized as Codes
from rqc.models.packing import pack

_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """A random weight [n, k] of N(0, 0.02²)."""

    n: int
    k: int
    seed: int

    @property
    def weight(self) -> NDArray[np.float32]:
        generator = np.random.default_rng(self.seed)
        return 0.02 * generator.standard_normal((self.n, self.k), np.float32)

    def blocks(self, block: int) -> Quantized:
        """Its 8-bit codes; blocks that do not divide k are padded, as in an engine."""
        return Quantized(self.n, self.k, quantize(self.weight, Grid(8, block)))


@dataclass(frozen=True, eq=False)
class Quantized:
    """8-bit codes of a linear."""

    n: int
    k: int
    codes: Codes

    @property
    def weight(self) -> NDArray[np.float32]:
        """The float weight that the codes stand for."""
        return self.codes.dequantize()


def quantized(n: int, k: int, block: int, *, seed: int) -> Quantized:
    """A random linear's 8-bit codes."""
    return Linear(n, k, seed).blocks(block)


@dataclass
class Variant:
    """A graph of linears, each on the graph input x{k} [rows, k], each an output y{index} [rows, n]."""

    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)
    outputs: int = 0

    @classmethod
    def blocks(cls, linears: Sequence[Quantized], *, level: int) -> Variant:
        """8-bit MatMulNBits at an accuracy level."""
        made = cls()
        for one in linears:
            codes, scales = made._tensor(one.codes.packed_codes()), made._tensor(one.codes.scales)
            made._output(one.k, made._blocks(one, [f"x{one.k}", codes, scales], 8, level, f"y{made.outputs}"))
        return made

    @classmethod
    def planes(cls, one: Quantized) -> Variant:
        """Two 4-bit MatMulNBits at level 0 and their sum, as SplitNibbles makes them."""
        made = cls()
        whole = one.codes.packed_codes()
        four, mask = np.uint8(4), np.uint8(15)
        n, groups = one.codes.scales.shape
        zeros = np.zeros((n, -(-groups // 2)), np.uint8)
        high: list[NDArray[Any]] = [pack(whole >> four, 4), one.codes.scales * np.float32(16), zeros + np.uint8(0x88)]
        low: list[NDArray[Any]] = [pack(whole & mask, 4), one.codes.scales, zeros]
        for name, plane in (("high", high), ("low", low)):
            inputs = [f"x{one.k}", *(made._tensor(value) for value in plane)]
            made.nodes.append(made._blocks(one, inputs, 4, 0, name))
        made._output(one.k, helper.make_node("Add", ["high", "low"], ["y0"]))
        return made

    @classmethod
    def floats(cls, linears: Sequence[Quantized]) -> Variant:
        """FusedMatMul on the dequantized weight, transposed in the kernel as an engine's float head is."""
        made = cls()
        for one in linears:
            inputs = [f"x{one.k}", made._tensor(one.weight)]
            output = f"y{made.outputs}"
            made._output(one.k, helper.make_node("FusedMatMul", inputs, [output], domain=_MICROSOFT, transB=1))
        return made

    @classmethod
    def dynamic(cls, linears: Sequence[Linear]) -> Variant:
        """DynamicQuantizeMatMul: one scale per output channel, and one for the whole activation, all rows of it."""
        made = cls()
        for one in linears:
            weight = one.weight
            scales = np.abs(weight).max(axis=1) / np.float32(127)
            codes = np.rint(weight / scales[:, None]).astype(np.int8)
            inputs = [f"x{one.k}", made._tensor(np.ascontiguousarray(codes.T)), made._tensor(scales)]
            output = f"y{made.outputs}"
            made._output(one.k, helper.make_node("DynamicQuantizeMatMul", inputs, [output], domain=_MICROSOFT))
        return made

    def model(self) -> bytes:
        """The graph, serialized."""
        inputs = [helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["rows", k]) for k in sorted(self.widths)]
        outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(self.outputs)]
        graph = helper.make_graph(self.nodes, "linears", inputs, outputs, self.tensors)
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid(_MICROSOFT, 1)]
        made: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return bytes(made.SerializeToString())

    def _blocks(self, one: Quantized, inputs: list[str], bits: int, level: int, output: str) -> NodeProto:
        return helper.make_node(
            "MatMulNBits",
            inputs,
            [output],
            domain=_MICROSOFT,
            K=one.k,
            N=one.n,
            bits=bits,
            block_size=one.codes.block_size,
            accuracy_level=level,
        )

    def _output(self, k: int, node: NodeProto) -> None:
        self.nodes.append(node)
        self.widths.add(k)
        self.outputs += 1

    def _tensor(self, value: NDArray[np.generic]) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name
