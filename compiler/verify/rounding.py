"""How an engine rounds what its linears read, and the same in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rqc.compiler.verify.stored import HINT, StoredGraph, StoredLinear
from rqc.models.description import EMBEDDING, HEAD
from rqc.models.fake_quant import ActivationGrid, GraphGrid, InputGrid, StaticGrid, quantize_inputs
from rqc.models.reference import Reference
from rqc.models.token_grid import TokenGrid
from rqc.passes.base import CLIP
from rqc.runtime.errors import EngineFormatError


@dataclass(frozen=True)
class Rounding:
    """Activations of `bits`, rounded by the linears' kernels out of sight, or by the graph in front of them.

    by_kernel: per token and block of the weight, for the head too (MatMulNBits at accuracy level 4). Else per token, or
    static: one scale per tensor; the head reads floats. symmetric, clip: of a grid per token; clip None: each linear's
    node says its own.
    """

    bits: int
    by_kernel: bool = False
    static: bool = False
    symmetric: bool = True
    clip: float | None = 1.0

    @classmethod
    def of(cls, stored: StoredGraph, bits: int) -> Rounding:
        """What the manifest says."""
        manifest = stored.file.manifest
        static = str(manifest["activations"]).startswith("int8 per tensor")
        clip = manifest.get("activation_clip", 1.0)
        return cls(
            bits,
            bits == 8 and manifest["target"] == "onnx",
            static,
            bool(manifest.get("activation_symmetric", True)),
            None if clip == "auto" else float(clip),
        )

    @property
    def alone(self) -> bool:
        """Whether what runs beside a linear reads x as it is. Else it reads the rounded x."""
        return self.by_kernel or self.static

    def grids(self, stored: StoredGraph) -> dict[str, InputGrid]:
        """The grid of each quantized linear's input, by its name in the manifest. Raises EngineFormatError for one
        without the scale that it should have, or clipped otherwise than the engine says."""
        return {
            label: self._grid(stored, linear)
            for label, linear in stored.linears.items()
            if self.bits < 16 and linear.quantized and label != EMBEDDING and (self.by_kernel or label != HEAD)
        }

    def let_round(self, stored: StoredGraph, reference: Reference) -> None:
        """Let the reference round what its linears read, on the grids that the engine has."""
        grids = {name: grid for label, grid in self.grids(stored).items() for name in stored.linears[label].names}
        quantize_inputs(reference, grids, linear_alone=self.alone)

    def _grid(self, stored: StoredGraph, linear: StoredLinear) -> InputGrid:
        if self.static:
            return StaticGrid(_scale(stored, linear))
        if self.by_kernel:
            return ActivationGrid(self.bits, stored.block(linear))
        grid = TokenGrid(self.bits, self.symmetric, _ratio(stored, linear) if self.clip is None else self.clip)
        _check_divisor(stored, linear, grid)
        return GraphGrid(grid)


def _ratio(stored: StoredGraph, linear: StoredLinear) -> float:
    """The clip ratio that a linear's node says."""
    said = linear.nodes[0].metadata_props.get(CLIP, "")
    try:
        ratio = float(said)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise EngineFormatError(f"{stored.file.path}: {linear.label} has the clip ratio {said!r}", hint=HINT)
    return ratio


def _check_divisor(stored: StoredGraph, linear: StoredLinear, grid: TokenGrid) -> None:
    """Raise EngineFormatError if the graph makes another scale of a token than the grid; codes of a few linears that
    are off would hardly show. Where nothing rounds, the codes do."""
    back = linear.input.producer()
    if back is not None and back.op_type == "Cast" and back.inputs[0] is not None:
        back = back.inputs[0].producer()
    least = back.inputs[1].producer() if back is not None and back.op_type == "Mul" and back.inputs[1] else None
    divide = least.inputs[0].producer() if least is not None and least.op_type == "Max" and least.inputs[0] else None
    if divide is None or divide.op_type != "Div":
        return
    found = stored.array(divide.inputs[1])
    if found.size != 1 or found != grid.divisor:
        raise EngineFormatError(
            f"{stored.file.path}: {linear.label} divides what it reads by {found.ravel()[0]:g}, {grid} by "
            f"{grid.divisor:g}",
            hint=HINT,
        )


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
