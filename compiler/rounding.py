"""How an engine rounds what its linears read, and the same in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rqc.compiler.stored import HINT, StoredGraph, StoredLinear
from rqc.models.description import EMBEDDING, HEAD
from rqc.models.fake_quant import ActivationGrid, StaticGrid, quantize_inputs
from rqc.models.reference import Reference
from rqc.runtime.errors import EngineFormatError


@dataclass(frozen=True)
class Rounding:
    """Activations of `bits`, rounded by the linears' kernels out of sight, or by the graph in front of them.

    by_kernel: per token and block of the weight, for the head too (MatMulNBits at accuracy level 4). Else per token, or
    static: one scale per tensor; the head reads floats.
    """

    bits: int
    by_kernel: bool = False
    static: bool = False

    @classmethod
    def of(cls, stored: StoredGraph, bits: int) -> Rounding:
        """What the manifest says."""
        static = str(stored.file.manifest["activations"]).startswith("int8 per tensor")
        return cls(bits, bits == 8 and stored.file.manifest["target"] == "onnx", static)

    @property
    def alone(self) -> bool:
        """Whether what runs beside a linear reads x as it is. Else it reads the rounded x."""
        return self.by_kernel or self.static

    def grids(self, stored: StoredGraph) -> dict[str, ActivationGrid | StaticGrid]:
        """The grid of each quantized linear's input, by its name in the manifest. Raises EngineFormatError for one
        without the scale that it should have."""
        return {
            label: self._grid(stored, linear)
            for label, linear in stored.linears.items()
            if linear.quantized and label != EMBEDDING and (self.by_kernel or label != HEAD)
        }

    def let_round(self, stored: StoredGraph, reference: Reference) -> None:
        """Let the reference round what its linears read, on the grids that the engine has."""
        grids = {name: grid for label, grid in self.grids(stored).items() for name in stored.linears[label].names}
        quantize_inputs(reference, grids, linear_alone=self.alone)

    def _grid(self, stored: StoredGraph, linear: StoredLinear) -> ActivationGrid | StaticGrid:
        if self.static:
            return StaticGrid(_scale(stored, linear))
        return ActivationGrid(self.bits, stored.block(linear) if self.by_kernel else -1)


def _scale(stored: StoredGraph, linear: StoredLinear) -> float:
    """The scale with which a linear's x was rounded and is read back."""
    back = linear.input.producer()
    codes = back.inputs[0] if back is not None and back.op_type == "DequantizeLinear" else None
    there = None if codes is None else codes.producer()
    if back is None or there is None or there.op_type != "QuantizeLinear" or codes is None:
        raise EngineFormatError(f"{stored.file.path}: what {linear.label} reads is not rounded", hint=HINT)
    scales = [stored.array(node.inputs[1]) for node in (there, back)]
    if codes.dtype != ir.DataType.INT8 or any(scale.size != 1 or scale != scales[0] for scale in scales):
        raise EngineFormatError(f"{stored.file.path}: {linear.label} reads back another scale", hint=HINT)
    return float(scales[0].astype("float32"))
