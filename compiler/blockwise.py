"""Calibrate block by block: each decoder block's graph runs on ONNX Runtime over the calibration text, what its linears
read is gathered as second moments, the block is rounded, and the rounded block gives the inputs of the next."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.calibrate import Array, Part, inputs_of, open_part, partition
from rqc.models.moments import Moments
from rqc.models.packing import Quantized
from rqc.models.quantized import Found
from rqc.models.weights import Weight
from rqc.passes.base import Pass, linears, weight_of
from rqc.runtime.errors import CheckpointError

ROWS_AT_ONCE = 4
"""Windows of text in memory at a time, with all that a block makes of them."""


@dataclass(frozen=True, eq=False)
class Site:
    """Linears of one block that read the same value: their weights, and the moments of what they read."""

    block: str
    weights: Mapping[str, Weight]
    moments: Moments


Solve = Callable[[Site], None]
"""Finds codes for the weights of a site, and keeps them."""
Round = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""What the engine makes of x [..., K] in front of a linear."""


@dataclass(eq=False)
class CodeStore:
    """Codes that were found, by weight name, in a folder of their own until the compile is over: no model's worth of
    them is in memory."""

    _folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="rqc-codes-")
    )
    _found: dict[str, Found] = field(default_factory=dict)

    def __setitem__(self, name: str, quantized: Quantized) -> None:
        path = Path(self._folder.name) / f"{len(self._found)}.npz"
        zeros = np.empty(0, np.uint8) if quantized.zero_points is None else quantized.zero_points
        np.savez(path, codes=quantized.codes, scales=quantized.scales, zeros=zeros)
        bits, storage, block = quantized.bits, quantized.storage_bits, quantized.block_size
        self._found[name] = lambda: _read(path, bits, storage, block)

    @property
    def found(self) -> Mapping[str, Found]:
        """What reads the codes of each weight."""
        return self._found


def _read(path: Path, bits: int, storage_bits: int, block: int) -> Quantized:
    with np.load(path) as stored:
        zeros = stored["zeros"] if stored["zeros"].size else None
        return Quantized(stored["codes"], stored["scales"], zeros, bits, storage_bits, block)


def calibrate(
    model: ir.Model,
    ids: NDArray[np.int64],
    solve: Solve,
    deployed: Callable[[], Sequence[Pass]],
    rounding: Callable[[int], Round | None] = lambda width: None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Call `solve` for every site of every decoder block of a float graph, in order, on token ids [windows, length].

    deployed: the passes that make of a block what the engine will compute, with what was solved so far; called for each
    block. rounding: what activations of that width are rounded by, if they are. told: blocks done, of how many.
    """
    weights = {name: weight for name, weight, _ in _quantizable(model)}
    watched = {name: value for name, _, value in _quantizable(model)}
    plain, seen = partition(model), partition(model, set(watched.values()))
    text = [inputs_of(model, ids[start : start + ROWS_AT_ONCE]) for start in range(0, len(ids), ROWS_AT_ONCE)]
    blocks = len(plain) - 2
    for index, (part, observed) in enumerate(zip(plain[:-1], seen[:-1], strict=True)):
        names = {name: value for name, value in watched.items() if value in observed.outputs}
        if names:
            for site in _sites(model, observed, names, weights, text, rounding):
                solve(site)
        _advance(model, part, deployed(), text, {name for later in plain[index + 1 :] for name in later.inputs})
        told(index, blocks)


def _quantizable(model: ir.Model) -> Iterator[tuple[str, Weight, str]]:
    """(name, weight, the value that it multiplies) of the linears of the blocks that a grid rounds."""
    for name, node in linears(model):
        weight = weight_of(model.graph.initializers.get(name))
        if weight is not None and node.inputs[0] is not None:
            yield name, weight, node.inputs[0].name or ""


def _sites(
    model: ir.Model,
    part: Part,
    names: Mapping[str, str],
    weights: Mapping[str, Weight],
    text: Sequence[Mapping[str, Array]],
    rounding: Callable[[int], Round | None],
) -> Iterator[Site]:
    """Run a block over the text; its linears by what they read, with the moments of that."""
    values = tuple(dict.fromkeys(names.values()))
    readers = {value: {name: weights[name] for name, read in names.items() if read == value} for value in values}
    widths = {value: next(iter(found.values())).shape[1] for value, found in readers.items()}
    rounds = {value: rounding(width) for value, width in widths.items()}
    moments = {value: Moments(widths[value], rounds[value] is not None) for value in values}
    session = open_part(model, Part(part.name, part.inputs, values), text[0])
    for known in text:
        results = session.run(list(values), {name: known[name] for name in part.inputs})
        for value, x in zip(values, results, strict=True):
            round_ = rounds[value]
            try:
                moments[value].add(x, None if round_ is None else round_(x))
            except CheckpointError as error:
                raise CheckpointError(f"{next(iter(readers[value]))}: {error.message}", hint=error.hint) from error
    del session
    for value in values:
        yield Site(part.name, readers[value], moments.pop(value))


def _advance(
    model: ir.Model, part: Part, passes: Sequence[Pass], text: Sequence[dict[str, Array]], needed: set[str]
) -> None:
    """Run a block as the engine will compute it; `text` then holds what later blocks read."""
    session = open_part(model, part, text[0], passes)
    for known in text:
        made = session.run(list(part.outputs), {name: known[name] for name in part.inputs})
        known.update(zip(part.outputs, made, strict=True))
        for name in known.keys() - needed:
            del known[name]
