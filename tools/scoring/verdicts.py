"""What the rows of tools/schemes have to show, and how those of two texts agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from scoring.rows import Row

W6A6, W4A4, W4A4_AIM, UNROTATED = 1.03, 3.0, 1.6, 50.0
"""Perplexity over that of floats, at most; and how many times better than unrotated rotated w4a4 is, at least."""
INT8_CACHE = 1.005
OBJECTIVE, MEDIAN_OBJECTIVE = 1.0, 0.75
ENGINE_TO_PYTORCH, ENGINE_TO_PYTORCH_A4 = 1.01, 1.02
RANKS, WINNER = 0.95, 1.02

Found = Mapping[Row, Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One line: what was found, and whether it is enough. must: whether the run fails without it."""

    text: str
    passed: bool
    must: bool = True

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'MISSED' if self.must else 'not reached'}: {self.text}"


def verdicts(found: Found, base: float) -> list[Verdict]:
    """On the rows that are there; base: the perplexity of floats."""
    scores = {row: float(one["perplexity"]) for row, one in found.items()}
    return [*_rotated(scores, base), *_objectives(found), *_pairs(scores)]


def _rotated(scores: Mapping[Row, float], base: float) -> list[Verdict]:
    made = []
    if best := _best(scores, lambda row: row.kind == "w6a6" and row.rotation != "none"):
        ratio = scores[best] / base
        made.append(Verdict(f"{best.name} is {ratio:.3f} × float (≤ {W6A6})", ratio <= W6A6))
    if best := _best(scores, lambda row: row.kind == "w4a4" and row.rotation != "none"):
        ratio = scores[best] / base
        made.append(Verdict(f"{best.name} is {ratio:.2f} × float (≤ {W4A4:g})", ratio <= W4A4))
        made.append(Verdict(f"{best.name} is {ratio:.2f} × float (aim: ≤ {W4A4_AIM})", ratio <= W4A4_AIM, must=False))
    made += _gained(scores, "w4a4-reference", "rtn", must=True)
    made += [one for kind in ("w4a4-reference", "w4a4") for one in _gained(scores, kind, "gptq", must=False)]
    if best := _best(scores, lambda row: row.kind == "w4a4-kv4"):
        made.append(Verdict(f"best with a 4-bit cache: {best.name}, {scores[best] / base:.2f} × float", True, False))
    return made


def _gained(scores: Mapping[Row, float], kind: str, method: str, *, must: bool) -> list[Verdict]:
    """How many times better the best rotated row of a kind is than the same without a rotation. It must be on the
    references' own grid and rounded to nearest, as they measure it: a grid with zero points, clips, and codes that make
    up for rounded activations all help what is not rotated too."""
    best = _best(scores, lambda row: (row.kind, row.method) == (kind, method) and row.rotation != "none")
    if best is None or (plain := replace(best, rotation="none")) not in scores:
        return []
    gain = scores[plain] / scores[best]
    return [Verdict(f"{best.name} is {gain:.0f} × better than {plain.name} (≥ {UNROTATED:g})", gain >= UNROTATED, must)]


def _objectives(found: Found) -> list[Verdict]:
    """Of every row that GPTQ fitted: no linear worse than by rounding to nearest, and the median well below; but for
    w4a4, whose objective has the rounding of activations in it, which weights make up for in part. Rows with zeros are
    left out: rounding to nearest keeps all weights."""
    made = []
    for row, one in found.items():
        if row.method == "gptq" and one["objective"] and "2of4" not in row.kind:
            name, worst = max(one["objective"].items(), key=lambda item: float(item[1]))
            middle = median(one["objective"].values())
            text = f"objective of {row.name} over rounding to nearest: worst {worst:.2f} ({name}), median {middle:.2f}"
            enough = middle <= MEDIAN_OBJECTIVE or row.kind.startswith("w4a4")
            made.append(Verdict(text, worst <= OBJECTIVE and enough))
    return made


def _pairs(scores: Mapping[Row, float]) -> list[Verdict]:
    """Each compensated row against the same one without, each row with a cache of codes against that of floats."""
    made = []
    for row, value in scores.items():
        if row.kind.endswith("-eora") and (plain := replace(row, kind=row.kind.removesuffix("-eora"))) in scores:
            text = f"EoRA takes {plain.name} from {scores[plain]:.2f} to {value:.2f}"
            made.append(Verdict(text, value < scores[plain]))
        if row.kind.startswith("w4a8-kv") and (plain := replace(row, kind="w4a8")) in scores:
            ratio, eight = value / scores[plain], row.kind == "w4a8-kv8"
            text = f"{row.name} is {ratio:.4f} × {plain.name}{f' (≤ {INT8_CACHE})' if eight else ''}"
            made.append(Verdict(text, ratio <= INT8_CACHE or not eight, must=eight))
    return made


def faithful(row: Row, one: Mapping[str, Any]) -> Verdict:
    """Whether engine and PyTorch's fake quantization have the same perplexity, and every gate of verify passed."""
    limit = ENGINE_TO_PYTORCH_A4 if row.kind.startswith("w4a4") else ENGINE_TO_PYTORCH
    ratio = one["engine"] / one["pytorch"]
    failed = f"; gates failed: {', '.join(one['failed'])}" if one["failed"] else ""
    text = (
        f"{row.name}: engine {one['engine']:.3f}, PyTorch {one['pytorch']:.3f}, {ratio:.4f} × (within {limit}){failed}"
    )
    return Verdict(text, max(ratio, 1 / ratio) <= limit and not failed)


def agreement(one: Mapping[Row, float], other: Mapping[Row, float]) -> list[Verdict]:
    """Of two texts' perplexities, on the rows that both have: the order of all, and the winner of each kind."""
    both = [row for row in one if row in other]
    ranks = spearman([one[row] for row in both], [other[row] for row in both])
    made = [Verdict(f"rank correlation of {len(both)} rows {ranks:.4f} (≥ {RANKS})", ranks >= RANKS)]
    for kind in dict.fromkeys(row.kind for row in both):
        rivals = [row for row in both if row.kind == kind]
        if len(rivals) > 1:
            first, second = min(rivals, key=one.__getitem__), min(rivals, key=other.__getitem__)
            ratio = other[first] / other[second]
            won = "wins both" if first == second else f"wins one, {second.name} the other, {ratio:.3f} × apart there"
            made.append(Verdict(f"{kind}: {first.name} {won} (≤ {WINNER})", ratio <= WINNER))
    return made


def spearman(one: Iterable[float], other: Iterable[float]) -> float:
    """Correlation of ranks; equal values share the mean of their ranks. NaN where one side is all equal."""
    first, second = (_ranks(np.fromiter(values, np.float64)) for values in (one, other))
    if len(first) < 2 or not first.std() or not second.std():
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place], np.float64)


def _best(scores: Mapping[Row, float], wanted: Callable[[Row], bool]) -> Row | None:
    return min(filter(wanted, scores), key=scores.__getitem__, default=None)
