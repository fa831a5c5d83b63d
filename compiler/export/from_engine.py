"""A GPTQ checkpoint of an engine: its own codes bit for bit, its scales in float16, its floats.

Where R1 runs online at the two ends of a tied stream, it goes into embedding and head, which are untied:
E ← E Q, H ← E diag(g) Q, g ← 1 for the final gain g. The linears stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.export.checkpoint import ExportReport, GptqCheckpoint
from rqc.compiler.export.from_model import neutral_norm
from rqc.compiler.export.layout import BITS, CENTER, ScaleRounding, Tensor, half, linear_tensors
from rqc.compiler.export.obstacles import CONFIG, check_config, check_engine, lost
from rqc.compiler.export.parameters import check_parameters
from rqc.compiler.tokenizer_files import TOKENIZER_FILES
from rqc.compiler.verify.stored import HINT, StoredGraph, StoredLinear
from rqc.compiler.verify.stored_frame import stored_frame
from rqc.models.algebra import Array, Folds, apply_folds, norm_folds, rotation_folds
from rqc.models.description import EMBEDDING, FINAL_NORM, HEAD, Architecture, Description, require_claim
from rqc.models.packing import Quantized
from rqc.passes.base import BRANCH_B, OFFSET, sizes
from rqc.runtime.container import EngineFile
from rqc.runtime.directories import Part
from rqc.runtime.errors import EngineFormatError, SchemeError

ROWS = 4096
"""Of a table that are folded at once."""
BIAS = 5
"""Its place among the inputs of MatMulNBits."""
TURNED = "embedding and head are two tables: R1, online at the ends of the engine's one, is folded into both"


def export_engine(path: Path, target: Path) -> ExportReport:
    """Write the GPTQ checkpoint that holds exactly an engine's codes.

    Raises SchemeError or UnsupportedModelError for an engine that is more than the format holds, InputError for one
    without config.json, EngineFormatError for a damaged one, CheckpointError for values beyond float16, ResourceError
    (no space).
    """
    with EngineFile.open(path) as file:
        check_config(file)
        architecture = Architecture(**file.manifest["architecture"])
        names = [name for row in file.manifest["layers"] for name in row["name"].split("+")]
        description = Description.of(architecture, names)
        check_engine(file, description)
        file.check()
        weights = _Weights(StoredGraph.read(file), description)
        weights.check()
        tensors, config = list(weights.tensors()), json.loads(file.read(CONFIG))
        group_size = int(file.manifest["group_size"])
        made = GptqCheckpoint(tensors, weights.rounding, config, group_size, weights.tied, _companions(file))
        check_parameters(made.settings(), tensors)
        return made.write(target, notes=[*lost(file.manifest), *([TURNED] if weights.folds else [])])


def _companions(file: EngineFile) -> dict[str, Part]:
    wanted = (*TOKENIZER_FILES, "generation_config.json")
    return {name: partial(file.chunks, name) for name in wanted if file.has(name)}


@dataclass(eq=False)
class _Weights:
    """The weights of an engine as tensors of a checkpoint. folds: what its two ends still have to take up."""

    stored: StoredGraph
    description: Description
    rounding: ScaleRounding = field(default_factory=ScaleRounding)
    folds: Folds = field(init=False)
    tied: bool = field(init=False)
    _last: tuple[StoredLinear, Quantized] | None = None

    def __post_init__(self) -> None:
        rotation, kept = stored_frame(self.stored.file, self.description)
        online = kept and "r1" in rotation.sites
        self.tied, self.folds = kept and not online, {}
        if online:
            gains = norm_folds(self.description, head=True)
            turns = rotation_folds(self.description, rotation, ends=True)
            self.folds = {EMBEDDING: turns[EMBEDDING], HEAD: [*gains[HEAD], *turns[HEAD]]}

    def check(self) -> None:
        """Raise SchemeError for a graph that computes anything beside its linears."""
        for node in self.stored.model.graph:
            if BRANCH_B in node.metadata_props or OFFSET in node.metadata_props:
                raise SchemeError(
                    f"{self.stored.file.path} is more than a GPTQ checkpoint holds: {node.name} runs beside a linear",
                    hint="rqc export MODEL_DIR",
                )

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter of the model, linears in four parts."""
        linears = self.stored.linears
        yield self._table(EMBEDDING, linears[EMBEDDING])
        for label, linear in linears.items():
            if label not in (EMBEDDING, HEAD):
                yield from self._linear(linear)
        if not self.tied:
            yield self._table(HEAD, linears[HEAD])
        for name, value in self.stored.model.graph.initializers.items():
            if name.endswith((".weight", ".bias")) and "+" not in name and len(shape := sizes(value)) == 1:
                if name == FINAL_NORM and HEAD in self.folds:
                    yield neutral_norm(name, shape[0], self.description)
                else:
                    yield self._floats(name, shape[0], value)

    def _linear(self, linear: StoredLinear) -> Iterator[Tensor]:
        """The parts of all linears that are stacked in one, with their biases."""
        first, group_size = 0, int(self.stored.file.manifest["group_size"])
        bias = linear.nodes[0].inputs[BIAS] if len(linear.nodes[0].inputs) > BIAS else None
        for name in linear.names:
            shape = self.description.shape(require_claim(self.description, name))
            rows = slice(first, first + shape[0])
            first, stem = rows.stop, name.removesuffix(".weight")
            yield from linear_tensors(stem, shape, group_size, partial(self._codes, linear, rows), self.rounding)
            if bias is not None:
                yield self._floats(f"{stem}.bias", shape[0], bias, rows)

    def _floats(self, name: str, size: int, value: ir.Value, rows: slice = slice(None)) -> Tensor:
        """A norm's gain or a bias, of which `rows` are its own."""
        return Tensor(
            name, (size,), np.float16, lambda: half(name, np.asarray(self.stored.array(value)[rows], np.float32))
        )

    def _codes(self, linear: StoredLinear, rows: slice) -> Quantized:
        """Rows of a linear's codes, around 8. Four tensors of every part are written one after the other: a memo of one
        slot serves them."""
        if self._last is None or self._last[0] is not linear:
            self._last = None  # let the old one go before the new one is read
            found = self.stored.quantized(linear, BITS)
            if found.storage_bits != BITS or (found.stored_zero_points() != CENTER).any():
                raise EngineFormatError(f"{linear.label} has not the codes that the manifest says", hint=HINT)
            self._last = (linear, found)
        return self._last[1].rows(rows)

    def _table(self, name: str, linear: StoredLinear) -> Tensor:
        a = self.description.architecture
        return Tensor(name, (a.vocab_size, a.hidden_size), np.float16, partial(self._folded, name, linear))

    def _folded(self, name: str, linear: StoredLinear) -> NDArray[np.float16]:
        """A table with what its end has to take up, float16, some rows at a time."""
        widths = {row["name"]: int(row["bits"]) for row in self.stored.file.manifest["layers"] if "bits" in row}
        whole = self.stored.quantized(linear, widths[name]) if linear.quantized else self.stored.floats(linear)
        parts = []
        for first in range(0, whole.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            found = whole.rows(rows).dequantize() if isinstance(whole, Quantized) else np.asarray(whole[rows])
            parts.append(half(name, apply_folds(self.folds.get(name, []), found.astype(np.float64), self._read, first)))
        return np.concatenate(parts)

    def _read(self, name: str) -> Array:
        """A parameter that folds ask for: the gain of the final norm."""
        return np.asarray(self.stored.array(self.stored.model.graph.initializers[name]), np.float64)
