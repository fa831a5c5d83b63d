"""Whether an engine's weights are those of this model: each against the float weight that the same folds give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.stored import StoredGraph, StoredLinear
from rqc.models.grid import Grid
from rqc.models.packing import Quantized, by_block
from rqc.models.reference import Reference

FLOAT_LIMITS = {"float32": 1e-6, "float16": 1e-3}
"""Relative distance to which storing a weight as a float may move it: a fold's rounding, and half a unit of fp16."""
MOST = 0.9
"""No grid moves a weight further; the weight of another model lies at √2."""
TIE = 1e-3
"""Steps by which a code may be off the nearest one: ties fall either way."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Belonging:
    """One stored weight: ‖Ŵ − W‖ / ‖W‖, what its storage allows of it, and how many codes are not the nearest."""

    name: str
    distance: float
    allowed: float
    misplaced: int

    @property
    def strain(self) -> float:
        """The distance in parts of what is allowed; above 1 the weight is another one."""
        return self.distance / self.allowed


def adopt_weights(stored: StoredGraph, reference: Reference, bits: dict[str, int]) -> list[Belonging]:
    """Measure every stored linear and table against the (folded) reference, then let the reference compute with it.

    bits: the width of each quantized linear's grid, by the manifest's names. Head and embedding may differ from now on.
    """
    reference.untie()
    return [_adopt(stored, linear, reference, bits.get(label, 0)) for label, linear in stored.linears.items()]


def _adopt(stored: StoredGraph, linear: StoredLinear, reference: Reference, bits: int) -> Belonging:
    parts = [reference.parts[name] for name in linear.names]
    wanted = np.concatenate([part.weight.numpy() for part in parts])
    found, allowed, misplaced = _stored(stored, linear, wanted, bits)
    norm = float(np.linalg.norm(wanted))
    distance = float(np.linalg.norm(found - wanted)) / norm if norm else float(np.linalg.norm(found) > 0)
    start = 0
    for name, part in zip(linear.names, parts, strict=True):
        rows = len(part.weight)
        reference.set_weight(name, np.array(found[start : start + rows]))
        start += rows
    return Belonging(linear.label, distance, allowed, misplaced)


def _stored(stored: StoredGraph, linear: StoredLinear, wanted: F32, bits: int) -> tuple[F32, float, int]:
    """The stored weight as float32, the relative distance that its storage allows, and its misplaced codes."""
    if not linear.quantized:
        raw = stored.floats(linear)
        return raw.astype(np.float32), FLOAT_LIMITS[str(raw.dtype)], 0
    quantized = stored.quantized(linear, bits)
    return quantized.dequantize(), _allowed(quantized, wanted), misplaced_codes(quantized, wanted)


def _allowed(quantized: Quantized, wanted: F32) -> float:
    """One step of the grid on every weight: rounding errs by half of it, clipping and compensation by some more."""
    n, k = quantized.shape
    total = 0.0
    for part, groups in by_block(np.broadcast_to(np.float32(1), (n, k)), quantized.block_size):
        total += float((quantized.scales[:, groups].astype(np.float64) ** 2).sum()) * part.shape[-1]
    norm = float(np.linalg.norm(wanted))
    return min(MOST, max(float(np.sqrt(total)) / norm, 1e-6)) if norm else MOST


def misplaced_codes(quantized: Quantized, wanted: F32) -> int:
    """How many codes are not the grid's nearest to w: 0 after rounding to nearest, however its scales were chosen."""
    low, high = Grid(quantized.bits, -1).code_range
    count = 0
    codes: NDArray[Any] = quantized.codes
    block, center = quantized.block_size, np.float32(1 << (quantized.storage_bits - 1))
    for (w, groups), (q, _) in zip(by_block(wanted, block), by_block(codes, block), strict=True):
        scale = quantized.scales[:, groups, None]
        zero = center if quantized.zero_points is None else quantized.zero_points[:, groups, None]
        place = np.divide(w, scale, out=np.zeros_like(w), where=scale != 0) + zero
        off = np.abs(np.clip(place, low, high) - q)
        count += int((off > 0.5 + TIE).sum())
    return count
