"""Engines that quantize activations, compared with PyTorch linear by linear: rounding is chaotic, no error may travel.

The reference runs once and is recorded. What lies between the engine's linears (norms, RoPE, attention, online
Hadamards, activation functions, the grid) is cut out of its graph and fed with the reference's outputs of every linear;
the inputs that it makes of them must lie on the same codes. Then each linear runs alone, on the reference's codes.

Side paths (an adapter's, or the correction of a grid's zero points) that read x as it is are part of what lies between
the linears. Through those that read the rounded x, or round it by themselves, an error would travel: they are part of
their linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as Names
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from rqc.compiler.probe import feed
from rqc.compiler.verify.belonging import relative
from rqc.compiler.verify.branchwise import branch_error, rounding_branches
from rqc.compiler.verify.cachewise import CacheParity, SeenAttention, as_entering, judged
from rqc.compiler.verify.rounding import Rounding
from rqc.compiler.verify.stored import StoredGraph, StoredLinear
from rqc.compiler.verify.stored_caches import StoredCache
from rqc.models.description import EMBEDDING
from rqc.models.fake_quant import InputGrid, Recording, recording
from rqc.models.online import watching_attention
from rqc.models.reference import Reference
from rqc.passes.scatter_cache import CAPACITY
from rqc.runtime.backends.session import compute_as_written

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class LinearParity:
    """One linear of the engine.

    elements: of its input; equal: share of their codes that agree; distance: codes by which the furthest is off;
    error: ‖y − y_ref‖ / ‖y_ref‖ on equal codes, or the same of its input where that is not rounded and off further, or
    of its distance from the grid where the graph rounds it;
    rounded: the same of y where the engine rounds its own input, which a kernel does out of sight.
    """

    name: str
    elements: int
    equal: float
    distance: int
    error: float
    rounded: float


def compare_linears(
    stored: StoredGraph,
    reference: Reference,
    ids: NDArray[np.int64],
    rounding: Rounding,
    threads: int,
    caches: Sequence[StoredCache] = (),
) -> tuple[list[LinearParity], list[CacheParity]]:
    """Every quantized linear of the engine, and every attention with a rounded cache, against a reference with the
    engine's weights and rounded activations."""
    linears = [linear for label, linear in stored.linears.items() if linear.quantized and label != EMBEDDING]
    ends = {linear.label: _ends(stored, linear, rounding) for linear in linears}
    joined = [name for linear in linears if ends[linear.label] == [linear.joined] for name in linear.names]
    names = [name for linear in linears for name in linear.names]
    rounding_beside = {linear.label: linear.names for linear in linears if rounding_branches(stored, linear)}
    bare = [name for names in rounding_beside.values() for name in names]
    with (
        recording(reference, names, wrapped=joined) as record,
        recording(reference, bare) as alone,
        watching_attention(reference.model) as watched,
    ):
        logits = reference.logits(ids)
    seen_by = {cache.layer: SeenAttention.of(watched[cache.layer]) for cache in caches}
    given = _given(linears, ends, record) | {cache.output: seen_by[cache.layer].output[None] for cache in caches}
    wanted = {_name(linear.input) for linear in linears}.union({"logits"}, *(cache.entering for cache in caches))
    found = _between(stored, given, wanted, ids, threads)
    grids = rounding.grids(stored)
    checks = []
    for linear in linears:
        x = record.inputs[_widest(linear, reference, joined)]
        seen = _Seen(x, _output(record, linear), found[_name(linear.input)])
        session = _session(stored, [_name(linear.input)], [_name(value) for value in ends[linear.label]], threads)
        check = _linear(linear.label, session, seen, grids.get(linear.label), rounding.by_kernel)
        if linear.label in rounding_beside:
            check = replace(check, error=_products(stored, linear, seen.x, alone, threads))
        checks.append(check)
    scores = found.get("logits")
    if scores is not None:
        checks.append(LinearParity("logits", scores.size, 1.0, 0, relative(scores, logits), 0.0))
    return checks, [_attention(stored, cache, seen_by[cache.layer], found, ids, threads) for cache in caches]


def _products(stored: StoredGraph, linear: StoredLinear, x: F32, alone: Recording, threads: int) -> float:
    """The error of a linear and of the branches beside it, each product by itself on equal codes."""

    def run(source: ir.Value, target: ir.Value, values: F32) -> NDArray[np.generic]:
        session = _session(stored, [_name(source)], [_name(target)], threads)
        return _alone(session, values.astype(_type(source)))

    session = _session(stored, [_name(linear.input)], [_name(value) for value in linear.outputs], threads)
    found = _alone(session, alone.inputs[linear.names[0]].astype(_type(linear.input)))
    return max(relative(found, _output(alone, linear)), branch_error(stored, linear, x, run))


def _ends(stored: StoredGraph, linear: StoredLinear, rounding: Rounding) -> list[ir.Value]:
    """Values whose sum is what a linear writes: with what runs beside it, if that reads the rounded x too, or rounds it
    by itself, and the sum is a value of the graph."""
    joined, apart = linear.joined, rounding.alone and not rounding_branches(stored, linear)
    return linear.outputs if apart or joined is None or not _comes_of(joined, linear.input) else [joined]


def _widest(linear: StoredLinear, reference: Reference, joined: Sequence[str]) -> str:
    """The part whose recorded x all of a linear reads: what wraps one sees x before the linear in it rounds it."""
    wrapped = (name for name in linear.names if name in joined)
    parts = ((name, reference.parts[name]) for name in wrapped)
    return next((name for name, part in parts if part.module is not part.linear), linear.names[0])


def _comes_of(value: ir.Value, source: ir.Value) -> bool:
    """Whether a value is computed from `source` and weights alone."""
    open_values = [value]
    while open_values:
        found = open_values.pop()
        if found is source or found.is_initializer():
            continue
        producer = found.producer()
        if producer is None:
            return False
        open_values += [one for one in producer.inputs if one is not None]
    return True


def _given(linears: Sequence[StoredLinear], ends: Mapping[str, list[ir.Value]], record: Recording) -> dict[str, F32]:
    """What the engine's linears write, [1, tokens, out] by value name, if it is what the reference's do."""
    given: dict[str, F32] = {}
    for linear in linears:
        first, *others = (_name(value) for value in ends[linear.label])
        given[first] = _output(record, linear)[None].astype(_type(ends[linear.label][0]))
        given |= {name: np.zeros_like(given[first]) for name in others}
    return given


def _between(
    stored: StoredGraph, given: Mapping[str, F32], wanted: Names[str], ids: NDArray[np.int64], threads: int
) -> dict[str, F32]:
    """The wanted values, [tokens, width] by name, of a graph in which others are given."""
    rest = {_name(value): _fed(value, ids) for value in stored.model.graph.inputs}
    session = _session(stored, [*rest, *given], sorted(wanted - given.keys()), threads)
    outputs = [item.name for item in session.get_outputs()]
    results = session.run(outputs, {**given, **rest})
    found = {**dict(zip(outputs, results, strict=True)), **{name: given[name] for name in wanted & given.keys()}}
    return {name: array.reshape(-1, array.shape[-1]) for name, array in found.items()}


def _attention(
    stored: StoredGraph,
    cache: StoredCache,
    seen: SeenAttention,
    found: Mapping[str, F32],
    ids: NDArray[np.int64],
    threads: int,
) -> CacheParity:
    """One attention by itself: what it keeps of the engine's own q, k and v, and what it makes of the reference's."""
    rest = {_name(value): _fed(value, ids) for value in stored.model.graph.inputs}
    session = _session(stored, [*rest, *cache.entering], [cache.output, *cache.presents], threads)
    own = {name: found[name][None] for name in cache.entering}
    same = as_entering(stored, cache, seen)
    _, *presents = session.run([cache.output, *cache.presents], {**rest, **own})
    output = session.run([cache.output], {**rest, **same})[0][0]
    width = seen.query.shape[0] * seen.query.shape[2]
    first = cache.entering[0]
    query = relative(own[first][..., :width], same[first][..., :width])
    return judged(cache, seen, query, [present[0] for present in presents], output)


def _fed(value: ir.Value, ids: NDArray[np.int64]) -> NDArray[Any]:
    """An input of the graph for one whole sequence with an empty past, in a cache that just holds it."""
    shape = [d if isinstance(d, int) else len(ids) if str(d) == CAPACITY else None for d in value.shape or ()]
    fed = feed(_name(value), shape, ids[None])
    return fed.astype(_type(value)) if fed.dtype.kind == "f" else fed


def _type(value: ir.Value) -> np.dtype[Any]:
    return (value.dtype or ir.DataType.FLOAT).numpy()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a linear of the reference read, x, and wrote, y; and what the engine's reads, where all write that."""

    x: F32
    y: F32
    engine_x: NDArray[Any]


def _linear(
    name: str,
    session: ort.InferenceSession,
    seen: _Seen,
    grid: InputGrid | None,
    by_kernel: bool,
) -> LinearParity:
    x, y, engine_x = seen.x, seen.y, seen.engine_x
    error = relative(_alone(session, x.astype(engine_x.dtype)), y)
    if grid is None:
        return LinearParity(name, x.size, 1.0, 0, max(error, relative(engine_x, x)), 0.0)
    off = np.abs(grid.codes(engine_x).astype(np.int16) - grid.codes(x))
    rounded = relative(_alone(session, engine_x), y)
    if not by_kernel:  # what the graph has rounded lies on the grid
        wide = engine_x.astype(np.float32)
        error = max(error, relative(wide, grid.read(wide)))
    return LinearParity(name, x.size, float((off == 0).mean()), int(off.max()), error, rounded)


def _alone(session: ort.InferenceSession, x: F32) -> NDArray[Any]:
    """y [tokens, out] of a linear in a session of its own, its planes added up, for x [tokens, in]."""
    planes = session.run(None, {session.get_inputs()[0].name: x[None]})
    return np.asarray(sum(plane[0].astype(np.float32) for plane in planes))


def _output(record: Recording, linear: StoredLinear) -> F32:
    return np.concatenate([record.outputs[name] for name in linear.names], axis=-1)


def _session(stored: StoredGraph, inputs: Sequence[str], outputs: Sequence[str], threads: int) -> ort.InferenceSession:
    """A session on the part of the engine's graph between the named values, weights in the engine file."""
    graph = ir.convenience.extract(stored.model.graph, inputs, outputs)
    for value in (*graph.inputs, *graph.outputs):
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    model = ir.to_proto(ir.Model(graph, ir_version=stored.model.ir_version)).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", stored.file.directory)
    if stored.file.manifest["target"] != "onnx":
        compute_as_written(options, model)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _name(value: ir.Value) -> str:
    return value.name or ""


def worst(checks: Sequence[LinearParity], *, rounded: bool) -> Iterator[str]:
    """One line for each measure: the linear that is furthest off. rounded: whether linears read codes."""
    coded = min(checks, key=lambda check: check.equal)
    far = max(checks, key=lambda check: check.error)
    if not rounded:
        yield f"linears: furthest off is {far.name}, {far.error:.1e}"
        return
    yield f"codes: fewest equal at {coded.name}, {coded.equal:.5%}, furthest off by {max(c.distance for c in checks)}"
    yield f"linears: furthest off on equal codes is {far.name}, {far.error:.1e}"
    yield f"linears: furthest off on codes of their own: {max(check.rounded for check in checks):.1e}"


def linear_gates(checks: Sequence[LinearParity]) -> Mapping[str, float]:
    """What the gates of linears with rounded activations hold to their limits."""
    elements = sum(check.elements for check in checks)
    return {
        "equal_codes": sum(check.equal * check.elements for check in checks) / elements,
        "code_distance": float(max(check.distance for check in checks)),
        "linear_error": max(check.error for check in checks),
        "kernel_rounding": max(check.rounded for check in checks),
    }
