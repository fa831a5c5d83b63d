"""How much rounding one part of a block to a width moves what the block gives on, measured on the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from rqc.compiler.calibration.blocks import Array, Part, inputs_of, open_part, partition
from rqc.models.description import Claim, Description
from rqc.models.families import FFN, HEADS
from rqc.models.grid import Grid, quantize
from rqc.passes.base import Pass, weight_of
from rqc.runtime.errors import CheckpointError

Errors = dict[str, dict[int, float]]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Unit:
    """Linears of one layer that share a width: what reads the same value, so that it still packs into one product; all
    experts of a kind. size: weights."""

    name: str
    layer: int
    weights: tuple[str, ...]
    size: int


def units_of(description: Description, claims: Sequence[Claim]) -> list[Unit]:
    """The linears claimed, by layer and by what they read (q/k/v, o, gate/up, down)."""
    groups: dict[tuple[int, str, bool], list[Claim]] = {}
    for claim in claims:
        groups.setdefault((claim.layer, _part(claim), claim.expert), []).append(claim)
    return [
        Unit(
            f"layers.{layer}.{'experts.' if expert else ''}{part}",
            layer,
            tuple(claim.weight for claim in group),
            sum(prod(description.shape(claim)) for claim in group),
        )
        for (layer, part, expert), group in groups.items()
    ]


def _part(claim: Claim) -> str:
    if claim.linear.reads in (HEADS, FFN):
        return "o" if claim.linear.reads == HEADS else "down"
    return "gate+up" if "up" in claim.linear.writes or "gate" in claim.linear.writes else "q+k+v"


class OpenWeights(Pass):
    """Weights become inputs of the graph: one session then runs with any values of them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name in self.names:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        return ir.passes.PassResult(model, modified=bool(self.names))


def sensitivities(
    model: ir.Model,
    units: Sequence[Unit],
    grid: Callable[[int], Grid],
    widths: Sequence[int],
    ids: NDArray[np.int64],
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Errors:
    """‖Δh‖² / ‖h‖² for each unit and width: h what the unit's block gives on, Δh what rounding that unit alone moves it
    by; mean over the tokens of ids [windows, length], each by its own ‖h‖². Three significant digits.

    model: a float graph, whose blocks run one after the other in float. grid: the grid of a width. Raises
    CheckpointError where h is not finite.
    """
    found: Errors = {}
    parts, known = partition(model), inputs_of(model, ids)
    for index, part in enumerate(parts[:-1]):
        here = [unit for unit in units if part.name == f"layer {unit.layer}"]
        block = _Block.open(model, part, known, [name for unit in here for name in unit.weights])
        plain = block.run({})
        for unit in here:
            found[unit.name] = {}
            for width in widths:
                rounded = {name: quantize(block.weights[name], grid(width)).dequantize() for name in unit.weights}
                found[unit.name][width] = _relative(unit.name, block.run(rounded), plain)
        known |= dict(zip(part.outputs, plain, strict=True))
        needed = {name for later in parts[index + 1 :] for name in later.inputs}
        known = {name: value for name, value in known.items() if name in needed}
        told(index, len(parts) - 2)
    return found


@dataclass(frozen=True, eq=False)
class _Block:
    """A block on ONNX Runtime, with what it reads, and its weights as inputs."""

    session: ort.InferenceSession
    outputs: tuple[str, ...]
    fed: Mapping[str, Array]
    weights: Mapping[str, F32]

    @classmethod
    def open(cls, model: ir.Model, part: Part, known: Mapping[str, Array], names: Sequence[str]) -> _Block:
        weights = {}
        for name in names:
            weight = weight_of(model.graph.initializers.get(name))
            assert weight is not None
            weights[name] = weight.float32()
        session = open_part(model, part, known, [OpenWeights(names)])
        return cls(session, part.outputs, {name: known[name] for name in part.inputs}, weights)

    def run(self, rounded: Mapping[str, F32]) -> list[Array]:
        """What the block gives on, with some weights rounded."""
        return list(self.session.run(list(self.outputs), {**self.fed, **self.weights, **rounded}))


def _relative(unit: str, moved: Sequence[Array], plain: Sequence[Array]) -> float:
    """Mean over tokens of ‖moved − plain‖² / ‖plain‖², over all floats [batch, sequence, width] that a block gives."""
    difference = norm = np.zeros(())
    for one, other in zip(moved, plain, strict=True):
        if other.dtype.kind == "f":
            wide = other.astype(np.float64)
            difference = difference + ((one.astype(np.float64) - wide) ** 2).sum(axis=-1)
            norm = norm + (wide**2).sum(axis=-1)
    error = float(np.mean(difference / np.maximum(norm, np.finfo(np.float64).tiny)))
    if not np.isfinite(error):
        raise CheckpointError(
            f"{unit}: what its block gives is not finite on the calibration text", hint="repair the checkpoint"
        )
    return float(f"{error:.3g}")
