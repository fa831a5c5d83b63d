"""What rounding leaves of an adapter: ⟨ΔŴ, ΔW⟩ / ‖ΔW‖² per linear, told before anything is written.

ΔW is what the adapter adds to a weight in the engine's basis, ΔŴ = round(W + ΔW) − round(W) what it adds to the stored
one, on the engine's own grid. 1: all of it arrives; 0: it was rounded away. Source: reference/rotation.md, section 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.instruments import Progress
from rqc.models.algebra import Array, apply_folds
from rqc.models.delta import Delta
from rqc.models.float_grid import AnyGrid, round_to
from rqc.models.merges import AddDelta
from rqc.models.quantized import LazyQuantized, Update
from rqc.models.weights import Weight
from rqc.passes.base import QUANTIZED, WEIGHT
from rqc.runtime.errors import ParityError

ROWS = 1024
"""Rows of a weight that are measured."""
RUN = 32
"""Neighbouring rows that are read at once."""
DIGITS = 4
NAMED = 5
"""Linears that an error or a table names."""

Rounding = Callable[[Array], NDArray[Any]]


def fold_survival(
    model: ir.Model, deltas: Mapping[str, Sequence[Delta]], progress: Progress | None = None
) -> dict[str, float]:
    """Survival by weight name of adapters folded into the weights of a lowered graph, four digits; of several in one
    weight, that of their sum.

    Exact on all rows of a weight with at most 1,024 of them; of a larger one, on 1,024 rows in evenly spaced runs of
    32: every row has a grid of its own, so a row's rounding does not depend on the others (what NVFP4 shares by tensor
    is that of the run here). Raises CheckpointError for weights that cannot be read.
    """
    names = {id(delta): name for name, several in deltas.items() for delta in several}
    found: dict[str, float] = {}
    for weight, rounding in _folded_weights(model):
        mine = [fold for fold in weight.folds if isinstance(fold, AddDelta) and id(fold.delta) in names]
        if mine and (name := names[id(mine[0].delta)]) not in found:
            found[name] = _survival(weight, mine, rounding)
            if progress is not None:
                progress.advance("survival", len(found), len(deltas))
    return {name: found[name] for name in deltas if name in found}


def beside_survival(model: ir.Model, deltas: Mapping[str, Delta]) -> dict[str, float]:
    """Survival by weight name of adapters in zero points and branches of a lowered graph, on the rows of
    `fold_survival`, four digits: what float32 leaves of a correction, of factors and of DoRA's scales.

    ΔW is what the adapter adds to the rounded weight, on which it was trained.
    """
    names = {id(delta): name for name, delta in deltas.items()}
    found = {name: _factor_survival(delta) for name, delta in deltas.items() if delta.magnitude is None}
    for quantized in _quantized_weights(model):
        for part, update in zip(quantized.parts, quantized.updates, strict=False):
            if update is not None and id(update.delta) in names:
                found[names[id(update.delta)]] = _update_survival(part, update, quantized.grid)
    return found


def check_survival(survival: Mapping[str, float], least: float, ways: str) -> None:
    """Raise ParityError, naming the linears, where less than `least` of an adapter is left. ways: what keeps it."""
    lost = {name: share for name, share in lowest(survival, len(survival)) if share < least}
    if not lost:
        return
    told = ", ".join(f"{name} ({share:.2g})" for name, share in list(lost.items())[:NAMED])
    more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    raise ParityError(
        f"rounding leaves less than {least:g} of the adapter in {len(lost)} of {len(survival)} linears: {told}{more}",
        hint=f"{ways} keeps it, and so does a base whose weights were not rounded before; "
        f"--min-survival {math.floor(100 * min(survival.values())) / 100:g} takes the loss",
    )


def lowest(survival: Mapping[str, float], count: int = NAMED) -> list[tuple[str, float]]:
    """The linears in which least is left, in rising order."""
    return sorted(survival.items(), key=lambda item: (item[1], item[0]))[:count]


def _folded_weights(model: ir.Model) -> Iterator[tuple[Weight, Rounding]]:
    """Every weight that the graph stores, with the rounding that its storage is; one stored twice comes twice."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        quantized, weight = tensor.meta.get(QUANTIZED), tensor.meta.get(WEIGHT)
        if isinstance(quantized, LazyQuantized):
            for part in quantized.parts:
                yield part, partial(_on_grid, quantized.grid)
        elif isinstance(weight, Weight) and len(weight.shape) == 2:  # a bias carries its linear's folds
            yield weight, partial(_cast, tensor.dtype.numpy())


def _on_grid(grid: AnyGrid, w: Array) -> NDArray[Any]:
    return round_to(w, grid).dequantize()


def _cast(dtype: np.dtype[Any], w: Array) -> NDArray[Any]:
    return w.astype(dtype)


def _quantized_weights(model: ir.Model) -> Iterator[LazyQuantized]:
    """Every quantized weight of the graph, once."""
    found = (value.const_value.meta.get(QUANTIZED) for value in model.graph.initializers.values() if value.const_value)
    yield from {id(quantized): quantized for quantized in found if isinstance(quantized, LazyQuantized)}.values()


def _update_survival(part: Weight, update: Update, grid: AnyGrid) -> float:
    """⟨ΔŴ, ΔW⟩ / ‖ΔW‖² of an update beside the rounded rows of a weight."""
    along = square = 0.0
    for (first, stop), rows in zip(runs(part.shape[0]), _rows(part), strict=True):
        plain = round_to(rows, grid)
        base = plain.dequantize().astype(np.float64)
        delta = update.delta.rows(slice(first, stop))
        adapted = update.applied(plain, first)
        kept = adapted.quantized.dequantize() - base
        if update.pooled:
            kept += np.repeat(adapted.correction, plain.block_size, axis=1)[:, : kept.shape[1]]
        else:
            kept += (adapted.factors[:, None] * delta.scale * delta.b).astype(np.float32) @ delta.a.astype(np.float32)
        added = delta.merged(base) - base
        along += float((kept * added).sum())
        square += float((added * added).sum())
    return round(along / square, DIGITS) if square else 1.0


def _factor_survival(delta: Delta) -> float:
    """The same for factors in float32, from their Gram matrices: ⟨B̂Â, BA⟩ = Σ (B̂ᵀB)(ÂAᵀ)."""
    b = delta.scale * delta.b
    along, square = (
        float(((kept_b.T @ b) * (kept_a @ delta.a.T)).sum())
        for kept_a, kept_b in ((delta.a.astype(np.float32), b.astype(np.float32)), (delta.a, b))
    )
    return round(along / square, DIGITS) if square else 1.0


def _survival(weight: Weight, mine: Sequence[AddDelta], rounding: Rounding) -> float:
    """⟨ΔŴ, ΔW⟩ / ‖ΔW‖² on the measured rows; 1 where the adapters (`mine`) add nothing to them."""
    base = replace(weight, folds=tuple(fold for fold in weight.folds if fold not in mine))
    along = square = 0.0
    for merged, plain in zip(_rows(weight), _rows(base), strict=True):
        added = merged - plain
        kept = rounding(merged).astype(np.float64) - rounding(plain)
        along += float((kept * added).sum())
        square += float((added * added).sum())
    return round(along / square, DIGITS) if square else 1.0


def _rows(weight: Weight) -> Iterator[Array]:
    """The measured rows, run by run; from the whole weight where a fold mixes rows."""
    if weight.row_local:
        for start, stop in runs(weight.shape[0]):
            stored = weight.checkpoint.read(weight.name, weight.start + start, weight.start + stop)
            yield apply_folds(list(weight.folds), stored, weight.checkpoint.read, start)
        return
    whole = weight.read()
    picked = [whole[start:stop].copy() for start, stop in runs(weight.shape[0])]
    del whole  # the weight without its adapter is made next
    yield from picked


def measuring_bytes(weight: Weight) -> int:
    """Peak bytes of measuring a weight, beside those of reading it: its picked rows, and the copies of those at hand;
    none where no adapter is folded."""
    if len(weight.shape) == 1 or not any(isinstance(fold, AddDelta) for fold in weight.folds):
        return 0
    picked = sum(stop - start for start, stop in runs(weight.shape[0]))
    at_hand = weight.shape[0] if weight.shape[0] <= ROWS else RUN
    return 8 * weight.shape[1] * ((0 if weight.row_local else 2 * picked) + 6 * at_hand)


def runs(rows: int) -> list[tuple[int, int]]:
    """(start, stop) of the measured runs of a weight's rows."""
    if rows <= ROWS:
        return [(0, rows)]
    starts = np.linspace(0, rows - RUN, ROWS // RUN).astype(int)
    return [(int(start), int(start) + RUN) for start in starts]
