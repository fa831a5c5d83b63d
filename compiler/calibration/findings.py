"""What calibration has found for a model in one frame."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.models.packing import Quantized
from rqc.models.quantized import Found
from rqc.runtime.replace_file import scratch_folder, scratch_written

DIGITS = 3
"""Of the figures in a report: sums differ in the last bits from machine to machine."""


class CodeStore:
    """Codes that were found, by weight name, in a folder of their own until the compile is over: no model's worth of
    them is in memory. One that a killed compile left is removed by the next."""

    def __init__(self) -> None:
        opened = ExitStack()
        self._folder = Path(opened.enter_context(scratch_folder("codes")))
        weakref.finalize(self, opened.close)
        self._found: dict[str, Found] = {}
        self._files = 0

    def __setitem__(self, name: str, quantized: Quantized) -> None:
        path = self._next("npz")
        zeros = np.empty(0, np.uint8) if quantized.zero_points is None else quantized.zero_points
        with scratch_written(str(self._folder)):
            np.savez(path, codes=quantized.codes, scales=quantized.scales, zeros=zeros)
        bits, storage, block = quantized.bits, quantized.storage_bits, quantized.block_size
        self._found[name] = lambda: _read(path, bits, storage, block)

    def on_disk(self, delta: Delta) -> Delta:
        """The update with its factors in files of the same folder, mapped."""
        mapped = []
        for factor in (delta.a, delta.scale * delta.b):
            path = self._next("npy")
            with scratch_written(str(self._folder)):
                np.save(path, factor)
            mapped.append(np.load(path, mmap_mode="r"))
        return Delta(*mapped)

    def _next(self, suffix: str) -> Path:
        self._files += 1
        return self._folder / f"{self._files}.{suffix}"

    @property
    def found(self) -> Mapping[str, Found]:
        """What reads the codes of each weight."""
        return self._found


def _read(path: Path, bits: int, storage_bits: int, block: int) -> Quantized:
    with np.load(path) as stored:
        zeros = stored["zeros"] if stored["zeros"].size else None
        return Quantized(stored["codes"], stored["scales"], zeros, bits, storage_bits, block)


@dataclass(frozen=True)
class Fit:
    """How well a weight's codes fit: ‖(W − Ŵ) X‖ / ‖W X‖ over the calibration text (X = I where none was read), with
    the branch of that rank beside them; and the same of the weight rounded to nearest.

    Where the rounding of activations is made up for too, ‖W Z − Ŵ X‖ / ‖W Z‖: Z is what X was before it was rounded.
    """

    error: float
    nearest: float
    rank: int = 0

    def to_json(self) -> dict[str, float]:
        """The fit as it stands in reports."""
        return {
            "error": short(self.error),
            "nearest": short(self.nearest),
            **({"rank": self.rank} if self.rank else {}),
        }


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found, by weight name, on so many tokens; none where weights alone decide."""

    tokens: int
    codes: CodeStore = field(default_factory=CodeStore)
    fits: dict[str, Fit] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    """Branches that make up for what rounding has done."""
    spectra: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """What a branch of any rank would make up for, in parts of what the linear computes."""
    coded: set[str] = field(default_factory=set)
    """The branches whose factors lose nothing as codes."""

    def add_branch(self, name: str, delta: Delta, *, coded: bool) -> None:
        """Keep the branch beside a weight, its factors in files as codes are."""
        self.deltas[name] = self.codes.on_disk(delta)
        if coded:
            self.coded.add(name)

    @property
    def found(self) -> Mapping[str, Found]:
        """What reads the codes of each weight."""
        return self.codes.found

    def of(self, names: Collection[str]) -> Findings:
        """The same with the branches of these weights alone, for a graph that has no others."""
        deltas = {name: delta for name, delta in self.deltas.items() if name in names}
        return replace(self, deltas=deltas)

    def to_json(self) -> dict[str, Any]:
        """What report.json says."""
        return {"tokens": self.tokens, "linears": {name: fit.to_json() for name, fit in self.fits.items()}}


def short(value: float) -> float:
    """A figure as reports have it."""
    return float(f"{value:.{DIGITS}g}")
