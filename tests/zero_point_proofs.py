"""What a zero-point merge did to one weight, held to its algebra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rqc.models.packing import F32, Quantized, by_block
from rqc.models.zero_points import F64, real_zero_points


def block_sums(x: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """P_g(x): sums of x [..., K] over blocks of inputs [..., G]."""
    return np.concatenate([part.sum(axis=-1) for part, _ in by_block(x, block)], axis=-1)


@dataclass(frozen=True)
class Certificate:
    """What a merge did to one weight: codes and scales that stayed, the range of the real zero points z′, and how far
    s (q − zr) + corr is from s (q − z) + D, relative to its largest element (corr is rounded to float32 once)."""

    codes_equal: bool
    scales_equal: bool
    lowest: float
    highest: float
    error: float

    @property
    def sound(self) -> bool:
        """Whether nothing was lost."""
        return self.codes_equal and self.scales_equal and self.error <= 1e-6


def certify(before: Quantized, after: Quantized, correction: F32, offset: F64) -> Certificate:
    """Compare a quantized weight with itself after a merge of `offset`; codes and scales bit by bit."""
    moved = real_zero_points(before, offset)[before.scales != 0]
    wanted = before.scales * -_zeros(before) + offset
    found = after.scales * -_zeros(after) + correction
    largest = np.abs(offset).max(initial=0.0) + (np.abs(before.scales) * _zeros(before)).max(initial=0.0)
    return Certificate(
        codes_equal=before.packed_codes().tobytes() == after.packed_codes().tobytes(),
        scales_equal=before.scales.tobytes() == after.scales.tobytes(),
        lowest=float(moved.min(initial=np.inf)),
        highest=float(moved.max(initial=-np.inf)),
        error=float(np.abs(found - wanted).max(initial=0.0) / max(largest, np.finfo(np.float64).tiny)),
    )


def _zeros(quantized: Quantized) -> F64:
    return quantized.stored_zero_points().astype(np.float64)
