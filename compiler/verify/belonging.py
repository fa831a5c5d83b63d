"""Whether an engine's weights are those of this model: each against the float weight that the same folds give."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.verify.precision import PRECISIONS, Precision
from rqc.compiler.verify.stored import StoredGraph, StoredLinear
from rqc.compiler.verify.stored_sides import StoredSide
from rqc.models.delta import Delta, magnitude_ratio, row_norms
from rqc.models.float_grid import FORMS, AnyGrid, FloatGrid, FloatQuantized, Kind, round_to
from rqc.models.grid import Grid
from rqc.models.packing import Quantized, by_block
from rqc.models.reference import Reference
from rqc.models.small_floats import SmallFloat

FLOAT_LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Relative distance to which storing a weight as a float may move it: a fold's rounding, and a unit of its type."""
MOST = 0.9
"""No grid moves a weight further; the weight of another model lies at √2."""
KINDS: dict[SmallFloat, Kind] = {form: kind for kind, (form, _) in FORMS.items()}
"""Grids of small floats by their values."""
TIE = 1e-3
"""Steps by which a code may be off the nearest one, and a zero point off an integer: ties fall either way."""
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Belonging:
    """One stored weight: ‖Ŵ − W‖ / ‖W‖ (or the sine between them), what its storage allows of it, how many codes are
    not the nearest.

    crowded: of a sparse weight, how many groups of four have more than two weights that are not zero.
    """

    name: str
    distance: float
    allowed: float
    misplaced: int = 0
    crowded: int = 0

    @property
    def strain(self) -> float:
        """The distance in parts of what is allowed; above 1 the weight is another one."""
        return self.distance / self.allowed


@dataclass(frozen=True, eq=False)
class Beside:
    """What an engine computes beside its linears, and what an adapter asks for there, by weight name.

    grid: the engine's, without its width. as_stored: the reference is to compute with base and side paths exactly as
    they are stored (zero points moved, rows scaled), not with the base that they were made from. precision: that of
    scales and side paths. own: branches are the engine's own, which make up for rounding; searched: codes were chosen
    together with them. crossed: codes or branches make up for the rounding of activations too. sparse: the weights of
    which two of four are zero.
    """

    sides: Mapping[str, StoredSide] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    as_stored: bool = False
    precision: Precision = PRECISIONS["fp32"]
    own: bool = False
    searched: bool = False
    crossed: bool = False
    sparse: Collection[str] = ()


def adopt_weights(
    stored: StoredGraph, reference: Reference, bits: dict[str, int], beside: Beside | None = None
) -> list[Belonging]:
    """Measure every stored linear and table against the (folded) reference, then let the reference compute with it.

    bits: the width of each quantized linear's grid, by the manifest's names. Head and embedding may differ from now on.
    """
    reference.untie()
    beside = beside or Beside()
    return [
        belonging
        for label, linear in stored.linears.items()
        for belonging in _adopt(stored, linear, reference, bits.get(label, 0), beside)
    ]


def _adopt(
    stored: StoredGraph, linear: StoredLinear, reference: Reference, bits: int, beside: Beside
) -> list[Belonging]:
    whole = stored.quantized(linear, bits) if linear.quantized else stored.floats(linear)
    found, first = [], 0
    for name in linear.names:
        wanted = reference.parts[name].weight.numpy()
        rows = slice(first, first + len(wanted))
        first = rows.stop
        weight = whole[rows] if isinstance(whole, np.ndarray) else whole.rows(rows)
        adopted = _Adopted(name, wanted, weight, beside)
        found += adopted.judge()
        reference.set_weight(name, adopted.base())
    return found


@dataclass(eq=False)
class _Adopted:
    """A stored weight beside the float one, and what the engine and the adapter have beside them.

    factors: what the engine's rows are scaled by, DoRA's m / n; zeros: the zero points before any merge.
    """

    name: str
    wanted: F32
    stored: Quantized | NDArray[np.generic]
    beside: Beside
    factors: F64 = field(init=False)
    original: Quantized | None = field(init=False)
    astray: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.delta = self.beside.deltas.get(self.name)
        self.side = self.beside.sides.get(self.name)
        self.factors = self._factors()
        self.original = self.stored if isinstance(self.stored, Quantized) else None
        if self.original is not None and self.side is not None and self.side.corrections:
            self.original = self._unmerged(self.original)

    def base(self) -> F32:
        """The weight with which the reference is to compute."""
        if not isinstance(self.stored, Quantized):
            return np.array(self.stored, np.float32)
        if self.beside.as_stored:
            return self.stored.dequantize()
        assert self.original is not None
        return (self.original.dequantize() / np.where(self.factors == 0, 1, self.factors)[:, None]).astype(np.float32)

    def judge(self) -> list[Belonging]:
        """How far the weight is from what it should be, and what runs beside it."""
        wanted = (self.wanted * self.factors[:, None]).astype(np.float32)
        if self.original is None:
            raw = self.stored
            assert isinstance(raw, np.ndarray)
            distance = relative(raw.astype(np.float32), wanted)
            found = [Belonging(self.name, distance, FLOAT_LIMITS[str(raw.dtype)])]
        else:
            found = self._judge_codes(self.original, wanted)
        return found if self.side is None else [*found, *self._judge_side(self.side)]

    def _judge_codes(self, original: Quantized, wanted: F32) -> list[Belonging]:
        """The codes alone, and with the branch that makes up for their error; only with it where both were chosen
        together."""
        values, sparse = original.dequantize(), self.name in self.beside.sparse
        own = self.beside.own and self.side is not None and bool(self.side.branches)
        crossed = self.beside.crossed  # what suits clipped inputs is longer than the weight
        allowed = MOST if sparse or crossed else _allowed(original, wanted)
        distance = sine if crossed else relative
        crowded = _crowded(values) if sparse else 0
        found = []
        if not (own and self.beside.searched):
            misplaced = misplaced_codes(original, wanted, self.beside.precision, pruned=sparse) + self.astray
            found.append(Belonging(self.name, distance(values, wanted), allowed, misplaced, crowded))
        if own and self.side is not None:
            whole = values + self.side.branch(wanted.shape)
            found.append(Belonging(f"{self.name} with its branch", distance(whole, wanted), allowed))
        return found

    def _factors(self) -> F64:
        """m / n of every row, n = ‖Ŵ + ΔW‖; ones where there is no DoRA beside the weight."""
        if self.delta is None or self.delta.magnitude is None:
            return np.ones(len(self.wanted))
        base = self.wanted.astype(np.float64)
        if isinstance(self.stored, Quantized):
            base = round_to(self.wanted, self._grid(self.stored)).dequantize().astype(np.float64)
        return magnitude_ratio(self.delta.magnitude, row_norms(base + self.delta.dense()))

    def _grid(self, stored: Quantized) -> AnyGrid:
        """The engine's, with the width of this weight."""
        if isinstance(stored, FloatQuantized):
            return FloatGrid(KINDS[stored.form], self.beside.grid["clip"])
        return Grid(stored.bits, **self.beside.grid)

    def _offsets(self, shape: tuple[int, int], block: int) -> F64:
        """What a merged adapter adds to each row and block [N, G], by the first column of its A in every block."""
        if self.delta is None or (self.side is not None and self.side.branches):
            return np.zeros(shape)
        offsets: F64 = self.factors[:, None] * ((self.delta.scale * self.delta.b) @ self.delta.a[:, ::block])
        return offsets

    def _unmerged(self, stored: Quantized) -> Quantized:
        """The weight with the zero points that a correction stands for: corr = D + s (zr − z), D of a merged adapter.
        Counts the codes in blocks where z is no integer."""
        assert self.side is not None
        s, moved = stored.scales.astype(np.float64), stored.stored_zero_points().astype(np.float64)
        offsets = self._offsets(s.shape, stored.block_size)
        rest = offsets - self.side.correction(s.shape)
        z = moved + np.divide(rest, s, out=np.zeros_like(s), where=s != 0)
        whole = np.clip(np.rint(z), 0, 255)
        precision = self.beside.precision
        stored_off = np.abs(self.side.correction(s.shape)) * precision.unit + precision.least
        slack = np.divide(stored_off, s, out=np.zeros_like(s), where=s != 0)
        slack = np.abs(slack) + np.abs(z - moved) * precision.of_scales(s)
        self.astray = int((np.abs(z - whole) > TIE + slack).sum()) * stored.block_size
        return replace(stored, zero_points=whole.astype(np.uint8), padding=None)

    def _judge_side(self, side: StoredSide) -> list[Belonging]:
        """The branch against c B A, the correction against D + s (zr − z)."""
        found, limit = [], self.beside.precision.side
        if side.branches and not self.beside.own:
            delta = np.zeros(self.wanted.shape) if self.delta is None else self.delta.dense()
            wanted = self.factors[:, None] * delta
            found.append(Belonging(f"{self.name} branch", relative(side.branch(wanted.shape), wanted), limit))
        if side.corrections and isinstance(self.stored, Quantized) and self.original is not None:
            s = self.stored.scales.astype(np.float64)
            zeros = [one.stored_zero_points().astype(np.float64) for one in (self.stored, self.original)]
            offsets = self._offsets(s.shape, self.stored.block_size)
            wanted = offsets + s * (zeros[0] - zeros[1])
            found.append(self._judge_correction(side.correction(s.shape), wanted, offsets))
        return found

    def _judge_correction(self, found: F64, wanted: F64, offsets: F64) -> Belonging:
        """Off by how much of what an adapter adds; where none was merged, of the correction itself."""
        name, limit = f"{self.name} correction", self.beside.precision.side
        norm = float(np.linalg.norm(offsets))
        if not norm:
            return Belonging(name, relative(found, wanted), limit)
        # the sum is rounded once, and may be much larger than the offset in it
        allowed = limit * (1 + float(np.linalg.norm(wanted)) / norm)
        return Belonging(name, float(np.linalg.norm(found - wanted)) / norm, allowed)


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """‖found − wanted‖ / ‖wanted‖; where nothing is wanted, whether something is there."""
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / norm if norm else float(np.linalg.norm(found) > 0)


def sine(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Of the angle between two weights: their distance whatever their lengths; above 1 where they are opposed."""
    lengths = float(np.linalg.norm(found)) * float(np.linalg.norm(wanted))
    if not lengths:
        return relative(found, wanted)
    cosine = float(np.einsum("nk,nk->", found, wanted, dtype=np.float64)) / lengths
    return float(np.sqrt(max(0.0, 1 - cosine * abs(cosine))))


def _allowed(quantized: Quantized, wanted: F32) -> float:
    """One step of the grid on every weight: rounding errs by half of it, clipping and compensation by some more."""
    n, k = quantized.shape
    total = 0.0
    if isinstance(quantized, FloatQuantized):
        total = float(np.square(quantized.steps(wanted).astype(np.float64)).sum())
    else:
        for part, groups in by_block(np.broadcast_to(np.float32(1), (n, k)), quantized.block_size):
            total += float((quantized.scales[:, groups].astype(np.float64) ** 2).sum()) * part.shape[-1]
    norm = float(np.linalg.norm(wanted))
    return min(MOST, max(float(np.sqrt(total)) / norm, 1e-6)) if norm else MOST


def _crowded(values: F32) -> int:
    """Groups of four neighbours in a row with more than two that are not zero."""
    n, k = values.shape
    filled = np.pad(values != 0, ((0, 0), (0, -k % 4)))
    return int((filled.reshape(n, -1, 4).sum(axis=2) > 2).sum())


def misplaced_codes(
    quantized: Quantized, wanted: F32, precision: Precision = PRECISIONS["fp32"], *, pruned: bool = False
) -> int:
    """How many codes are not the grid's nearest to w: 0 after rounding to nearest, however its scales were chosen.

    Codes were chosen by scales in float32: what storing these has moved is not held against them. pruned: neither are
    zeros.
    """
    if isinstance(quantized, FloatQuantized):
        return _misplaced_floats(quantized, wanted, precision)
    low, high = Grid(quantized.bits, -1).code_range
    count = 0
    codes: NDArray[Any] = quantized.codes
    block, center = quantized.block_size, np.float32(1 << (quantized.storage_bits - 1))
    for (w, groups), (q, _) in zip(by_block(wanted, block), by_block(codes, block), strict=True):
        scale = quantized.scales[:, groups, None]
        zero = center if quantized.zero_points is None else quantized.zero_points[:, groups, None]
        steps = np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)
        off = np.abs(np.clip(steps + zero, low, high) - q)
        if precision.unit:
            off -= np.abs(steps) * precision.of_scales(scale.astype(np.float64))
        if pruned:
            off = np.where(q == zero, 0, off)
        count += int((off > 0.5 + TIE).sum())
    return count


def _misplaced_floats(quantized: FloatQuantized, wanted: F32, precision: Precision) -> int:
    """The same of small floats. A scale that is off by a share moves both distances by that share of the weight."""
    form, count = quantized.form, 0
    codes: NDArray[Any] = quantized.codes
    block = quantized.block_size
    for (w, groups), (q, _) in zip(by_block(wanted, block), by_block(codes, block), strict=True):
        scale = quantized.scales[:, groups, None]
        x: F32 = np.clip(w / scale, -form.top, form.top).astype(np.float32)
        off = np.abs(x - form.values(q)) - np.abs(x - form.nearest(x))
        if precision.unit:
            off -= 2 * np.abs(x) * precision.of_scales(scale.astype(np.float64))
        count += int((off > TIE * form.steps(x)).sum())
    return count
