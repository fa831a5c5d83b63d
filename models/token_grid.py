"""The grid per token on which a graph rounds activations, in numpy: scales, zero points, codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
TINY = np.finfo(np.float32).tiny
"""No scale is smaller: a token of zeros has this one."""


@dataclass(frozen=True)
class TokenGrid:
    """x ≈ c s for every token x [..., K]; c is a whole number of `bits` bits, counted from the zero point.

    symmetric (RoLoRA, QuaRot): s = clip · max |x| / (2^(b−1) − 1), −2^(b−1) ≤ c < 2^(b−1).
    Else (SpinQuant): s = clip · (max(x, 0) − min(x, 0)) / (2^b − 1), z = round(−clip · min(x, 0) / s) and
    −z ≤ c < 2^b − z.

    All in float32, halves to even, as the graph of an engine computes it. What lies beyond the range is cut off.
    """

    bits: int
    symmetric: bool = True
    clip: float = 1.0

    @property
    def limit(self) -> int:
        """The code that the top of the range becomes, where it is symmetric."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def steps(self) -> int:
        """Codes above the lowest one."""
        return int(2**self.bits - 1)

    @property
    def divisor(self) -> np.float32:
        """What the extent of a token, clipped by nothing, is divided by to give its scale."""
        return np.float32((self.limit if self.symmetric else self.steps) / self.clip)

    def codes(self, x: NDArray[Any]) -> tuple[NDArray[np.int16], F32]:
        """Codes c [..., K] and scales [..., 1] of tokens x [..., K]."""
        x = np.asarray(x, np.float32)
        if self.symmetric:
            scales = self._scales(np.abs(x).max(-1, keepdims=True))
            codes = np.clip(np.rint(x / scales), -self.limit - 1, self.limit)
            return codes.astype(np.int16), scales
        lowest = np.minimum(x.min(-1, keepdims=True), np.float32(0))
        scales = self._scales(np.maximum(x.max(-1, keepdims=True), np.float32(0)) - lowest)
        bottom = np.rint(lowest / scales * np.float32(self.clip))
        codes = np.clip(np.rint(x / scales), bottom, bottom + np.float32(self.steps))
        return codes.astype(np.int16), scales

    def round(self, x: NDArray[Any]) -> F32:
        """x [..., K] on the grid."""
        codes, scales = self.codes(x)
        return codes.astype(np.float32) * scales

    def read(self, x: NDArray[Any]) -> tuple[NDArray[np.int16], F32]:
        """Codes and scales of tokens x [..., K] that lie on the grid: the codes at their ends tell their scales.

        The ends of a clipped range always have codes, but for the lowest one of a symmetric grid: it has one where the
        clipping is enough for a token to reach it, and then only if the token is that low.
        """
        x = np.asarray(x, np.float32)
        high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
        low = np.maximum(-x.min(-1, keepdims=True), np.float32(0))
        if self.symmetric:
            lowest = min(self.limit + 1, round(self.limit / self.clip))
            scales = np.maximum(high / np.float32(self.limit), low / np.float32(lowest))
        else:
            scales = (high + low) / np.float32(self.steps)
        scales = np.maximum(scales, TINY)
        return np.rint(x / scales).astype(np.int16), scales

    def _scales(self, extent: F32) -> F32:
        scales: F32 = np.maximum(extent / self.divisor, TINY)
        return scales

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits}-bit per token, {kind}" + ("" if self.clip == 1 else f", clip {self.clip:g}")
