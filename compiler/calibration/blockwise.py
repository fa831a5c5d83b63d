"""Calibrate block by block: each decoder block's graph runs on ONNX Runtime over the calibration text, what its linears
read is gathered as second moments, the block is rounded, and the rounded block gives the inputs of the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.calibration.blocks import LAYER, Array, Part, inputs_of, open_part, partition, run_part
from rqc.models.moments import Moments
from rqc.models.weights import Weight
from rqc.passes.base import Pass, linears, weight_of
from rqc.runtime.errors import CheckpointError

ROWS_AT_ONCE = 4
"""Windows of text in memory at a time, with all that a block makes of them."""


@dataclass(frozen=True, eq=False)
class Site:
    """Linears of one block that read the same value: their weights, and the moments of what they read in the engine, or
    of anything at all (`Moments.white`)."""

    block: str
    weights: Mapping[str, Weight]
    moments: Moments


Solve = Callable[[Site], None]
"""Finds codes for the weights of a site, and keeps them."""
Round = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""What the engine makes of x [..., K] in front of a linear."""


def calibrate(
    model: ir.Model,
    names: Collection[str],
    ids: NDArray[np.int64],
    solve: Solve,
    deployed: Callable[[Collection[str]], Sequence[Pass]],
    rounding: Callable[[ir.Node], Round | None] = lambda node: None,
    told: Callable[[int, int], None] = lambda done, total: None,
    *,
    crossed: bool = False,
) -> None:
    """Call `solve` for every site of every decoder block of a float graph, in order, on token ids [windows, length].

    names: the weights that are to be solved (a mixture's routers stay in floats). deployed: the passes that make of a
    block with these weights what the engine will compute, once they are solved. rounding: how what a linear reads is
    rounded, if it is. told: blocks done, of how many. crossed: moments also with what was there before it was rounded.
    """
    readers = _readers(model, names)
    parts = partition(model)
    text = [inputs_of(model, ids[start : start + ROWS_AT_ONCE]) for start in range(0, len(ids), ROWS_AT_ONCE)]
    blocks = len(parts) - 2
    for index, part in enumerate(parts[:-1]):
        here = [one for one in readers if one.block == part.name]
        for site in _sites(model, part, here, text, rounding, crossed=crossed):
            solve(site)
        passes = deployed([one.name for one in here])
        needed = {name for later in parts[index + 1 :] for name in later.inputs}
        for _ in run_part(model, part, text, needed, passes):
            pass
        told(index, blocks)


def solve_by_weights(model: ir.Model, names: Collection[str], solve: Solve, told: Callable[[int, int], None]) -> None:
    """`calibrate` without a text: as if all that a linear may read were equally likely. Nothing runs."""
    readers = _readers(model, names)
    blocks = list(dict.fromkeys(one.block for one in readers))
    for index, block in enumerate(blocks):
        for one in (one for one in readers if one.block == block):
            solve(Site(block, {one.name: one.weight}, Moments.white(one.weight.shape[1])))
        told(index + 1, len(blocks))


@dataclass(frozen=True, eq=False)
class _Reader:
    """A linear: the value that it reads, and what it multiplies it with. block: the part of the graph that it is in."""

    block: str
    name: str
    weight: Weight
    node: ir.Node

    @property
    def value(self) -> str:
        source = self.node.inputs[0]
        return "" if source is None else source.name or ""


def _readers(model: ir.Model, names: Collection[str]) -> list[_Reader]:
    """The linears of these names that stand in the graph with a weight, layer by layer."""
    found = []
    for name, node in linears(model):
        weight, layer = weight_of(model.graph.initializers.get(name)), LAYER.search(name)
        if name in names and weight is not None and layer is not None:
            found.append(_Reader(f"layer {layer[1]}", name, weight, node))
    return found


def _sites(
    model: ir.Model,
    part: Part,
    readers: Sequence[_Reader],
    text: Sequence[Mapping[str, Array]],
    rounding: Callable[[ir.Node], Round | None],
    *,
    crossed: bool,
) -> Iterator[Site]:
    """Run a block over the text; its linears by what they read, with the moments of that: made in the block, or given
    to it, as it is where no norm stands in front of a linear."""
    if not readers:
        return
    first = {one.value: one for one in reversed(readers)}
    values = tuple(dict.fromkeys(one.value for one in readers))
    rounds = {value: rounding(first[value].node) for value in values}
    moments = {value: Moments(first[value].weight.shape[1], crossed=crossed) for value in values}
    made = tuple(value for value in values if value not in part.inputs)
    session = open_part(model, Part(part.name, part.inputs, made), text[0])
    for known in text:
        results = session.run(list(made), {name: known[name] for name in part.inputs})
        read = {**known, **dict(zip(made, results, strict=True))}
        for value in values:
            x = read[value]
            try:
                moments[value].add(x if (round_ := rounds[value]) is None else round_(x), x)
            except CheckpointError as error:
                raise CheckpointError(f"{first[value].name}: {error.message}", hint=error.hint) from error
    del session
    for value in values:
        weights = {one.name: one.weight for one in readers if one.value == value}
        yield Site(part.name, weights, moments.pop(value))
