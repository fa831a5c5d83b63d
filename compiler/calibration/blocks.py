"""Run a graph block by block: one decoder layer in memory, its inputs and outputs in numpy."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from rqc.compiler.calibration.device import open_session
from rqc.compiler.probe import feed, save_stage
from rqc.compiler.verify.parity import Perplexity, log_softmax
from rqc.passes.base import Pass
from rqc.runtime.replace_file import scratch_folder

LAYER = re.compile(r"layers\.(\d+)\b")
POSITIONS_AT_ONCE = 64
Array = NDArray[np.generic]
DTYPES = {
    np.dtype(np.float32): ir.DataType.FLOAT,
    np.dtype(np.int64): ir.DataType.INT64,
    np.dtype(np.int32): ir.DataType.INT32,
    np.dtype(np.bool_): ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Part:
    """Consecutive nodes of a graph with the values that cross into and out of them."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def partition(model: ir.Model, watched: Collection[str] = ()) -> list[Part]:
    """The embedding part, one part per decoder layer, and the part of final norm and head.

    watched: values that a part gives out besides.
    """
    stages = _stages(model)
    last = max(stages.values())
    inputs: dict[int, dict[str, None]] = {stage: {} for stage in range(-1, last + 1)}
    outputs: dict[int, dict[str, None]] = {stage: {} for stage in range(-1, last + 1)}
    for node, stage in stages.items():
        for output in node.outputs:
            if output.name in watched:
                outputs[stage][output.name or ""] = None
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is not None and producer not in stages:
                continue  # made of weights alone: each part that reads it makes it
            source = None if producer is None else stages[producer]
            if source != stage:
                inputs[stage][value.name or ""] = None
                if source is not None:
                    outputs[source][value.name or ""] = None
    outputs[last]["logits"] = None
    names = {-1: "embedding", last: "head"}
    return [
        Part(names.get(stage, f"layer {stage}"), tuple(inputs[stage]), tuple(outputs[stage]))
        for stage in range(-1, last + 1)
        if outputs[stage]
    ]


def _stages(model: ir.Model) -> dict[ir.Node, int]:
    """-1 before the layers, the layer's number inside one, the number of layers behind them.

    A node whose name tells no layer belongs to the layer that reads it, if one does (the casts of an expert's mask).
    What is made of nothing but weights (a transposed table, 1 + w) has no stage.
    """
    numbers = [int(match[1]) for node in model.graph if (match := LAYER.search(node.name or ""))]
    behind = max(numbers) + 1
    stages: dict[ir.Node, int] = {}
    constant: set[ir.Node | None] = set()
    for node in model.graph:
        match = LAYER.search(node.name or "")
        if all(value is None or value.is_initializer() or value.producer() in constant for value in node.inputs):
            constant.add(node)
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        before = max((stages.get(producer, -1) for producer in producers if producer is not None), default=-1)
        stages[node] = int(match[1]) if match else behind if before >= 0 else -1
    for node in reversed(list(stages)):
        readers = [stages[user] for user, _ in (use for output in node.outputs for use in output.uses())]
        if stages[node] == behind and readers:
            stages[node] = min(readers)
    return stages


def run_parts(
    model: ir.Model, token_ids: NDArray[np.int64], *, threads: int = 0, watched: Collection[str] = ()
) -> Iterator[tuple[Part, dict[str, Array]]]:
    """Run [batch, sequence] token ids part by part; yields every part with all values that later parts read, and the
    watched ones of its own.

    The head's logits come [batch, sequence, vocab] in slices of positions: that part is yielded once per slice.
    """
    parts = partition(model, watched)
    known = inputs_of(model, token_ids)
    for index, part in enumerate(parts):
        session = open_part(model, part, known, threads=threads)
        if index < len(parts) - 1:
            results = session.run(list(part.outputs), {name: known[name] for name in part.inputs})
            made = dict(zip(part.outputs, results, strict=True))
            known.update(made)
            needed = {name for later in parts[index + 1 :] for name in later.inputs}
            known = {name: value for name, value in known.items() if name in needed}
            yield part, known | {name: value for name, value in made.items() if name in watched}
            continue
        for start in range(0, token_ids.shape[1], POSITIONS_AT_ONCE):
            piece = {name: known[name][:, start : start + POSITIONS_AT_ONCE] for name in part.inputs}
            (logits,) = session.run(["logits"], piece)
            yield part, {"logits": logits}


def run_part(
    model: ir.Model,
    part: Part,
    text: Sequence[dict[str, Array]],
    needed: Collection[str],
    passes: Sequence[Pass] = (),
) -> Iterator[dict[str, Array]]:
    """Run one part over pieces of text, `passes` applied to it; yields what it makes of each, in order.

    text: what is known of each piece, by name; of that and of what is made here, what is `needed` stays in it.
    """
    session = open_part(model, part, text[0], passes)
    for known in text:
        results = session.run(list(part.outputs), {name: known[name] for name in part.inputs})
        made: dict[str, Array] = dict(zip(part.outputs, results, strict=True))
        known.update({name: value for name, value in made.items() if name in needed})
        for name in known.keys() - needed:
            del known[name]
        yield made


def inputs_of(model: ir.Model, token_ids: NDArray[np.int64]) -> dict[str, Array]:
    """What a graph is fed with for whole sequences [batch, sequence] with an empty past."""
    return {
        value.name or "": feed(
            value.name or "", [d if isinstance(d, int) else None for d in value.shape or ()], token_ids
        )
        for value in model.graph.inputs
    }


def open_part(
    model: ir.Model, part: Part, known: Mapping[str, Array], passes: Sequence[Pass] = (), *, threads: int = 0
) -> ort.InferenceSession:
    """A session on a part of a graph, cut out, with `passes` applied to the cut alone; known: its inputs, or such."""
    graph = ir.convenience.extract(model.graph, list(part.inputs), list(part.outputs))
    for value in graph.inputs:
        value.type = ir.TensorType(DTYPES[known[value.name or ""].dtype])
        value.shape = None
    block = ir.Model(graph, ir_version=model.ir_version)
    graph.opset_imports.update(model.graph.opset_imports)
    for step in passes:
        step(block)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # by default a product behind DequantizeLinear is fused, and rounds its activations to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    with scratch_folder("block") as folder:
        path = Path(folder) / "block.onnx"
        save_stage(block, path)
        return open_session(str(path), options)


def perplexity(model: ir.Model, token_ids: NDArray[np.int64], *, threads: int = 0) -> float:
    """exp of the mean negative log-likelihood of every next token within the windows [batch, sequence]."""
    score, position = Perplexity(), 0
    for part, values in run_parts(model, token_ids, threads=threads):
        if part.name != "head":
            continue
        logits = np.asarray(values["logits"], np.float32)
        targets = token_ids[:, position + 1 : position + 1 + logits.shape[1]]
        for row, wanted in zip(logits, targets, strict=True):
            score.add(log_softmax(row), wanted)
        position += logits.shape[1]
    return score.value
