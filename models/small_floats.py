"""Floats of 8 and 4 bits: which values they have, and rounding to the nearest of them.

A sign, an exponent field E and m bits of mantissa M. With e the exponent of the least normal value:

* E = 0: value = M 2^(e − m) (subnormal, evenly spaced about 0);  E > 0: value = (2^m + M) 2^(E − 1 + e − m).
* The spacing about x is step(x) = 2^(max(⌊log2 |x|⌋, e) − m); the nearest value is round(x / step) step, halves to
  even, which are those with an even M. Beyond the largest value, that one (saturation).
* The code of a magnitude counts the values from 0 up: round(|x| / step) + (max(⌊log2 |x|⌋, e) − e) 2^m. A mantissa that
  rounding makes overflow carries into the exponent by itself.

E4M3 is that of "FP8 Formats for Deep Learning" (arXiv 2209.05433): no infinities, NaN in the place of ±480. E2M1 is
that of the OCP Microscaling Formats specification 1.0: sixteen numbers and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rqc.models.packing import F32, U8

__all__ = ["E2M1", "E4M3", "SmallFloat"]

_EXPONENT, _BIAS, _MANTISSA_BITS = np.uint32(0x7F800000), 127, np.uint32(23)
"""Of float32: the bits of the exponent field, its bias, and the bits below it."""


@dataclass(frozen=True)
class SmallFloat:
    """A float of `bits`, `mantissa` of them behind the exponent.

    least: exponent of the least normal value. top: the largest value. storage: numpy's name for it.
    """

    name: str
    bits: int
    mantissa: int
    least: int
    top: float
    storage: np.dtype[Any]

    @cached_property
    def levels(self) -> F32:
        """float32 [2^bits]: the value of every code; NaN where there is none."""
        codes = np.arange(1 << (self.bits - 1))
        exponent, mantissa = codes >> self.mantissa, codes % (1 << self.mantissa)
        normal = exponent > 0
        magnitude = np.ldexp(
            np.where(normal, (1 << self.mantissa) + mantissa, mantissa).astype(np.float32),
            np.maximum(exponent - 1, 0) + self.least - self.mantissa,
        )
        magnitude[magnitude > self.top] = np.nan
        levels: F32 = np.concatenate([magnitude, -magnitude]).astype(np.float32)
        levels.setflags(write=False)
        return levels

    def steps(self, x: F32) -> F32:
        """step(x), the spacing of values about each x; x finite."""
        power = (x.view(np.uint32) & _EXPONENT).view(np.float32)  # 2^⌊log2 |x|⌋, 0 for subnormals of float32
        np.maximum(power, np.float32(2.0**self.least), out=power)
        power *= np.float32(2.0**-self.mantissa)
        return power

    def nearest(self, x: F32) -> F32:
        """The nearest value to each finite x."""
        out = np.clip(x, np.float32(-self.top), np.float32(self.top))
        steps = self.steps(out)
        out /= steps
        np.rint(out, out=out)
        out *= steps
        return out

    def codes(self, x: F32) -> U8:
        """The code of the nearest value to each finite x, one to a byte."""
        least = np.uint32(_BIAS + self.least)
        exponent = np.maximum((x.view(np.uint32) & _EXPONENT) >> _MANTISSA_BITS, least) - least
        index = np.rint(np.abs(x) / self.steps(x))
        index += (exponent << self.mantissa).astype(np.float32)
        codes: U8 = np.minimum(index, np.float32(np.nanargmax(self.levels))).astype(np.uint8)
        codes |= np.signbit(x).astype(np.uint8) << np.uint8(self.bits - 1)
        return codes

    def values(self, codes: U8) -> F32:
        """float32 values of codes."""
        found: F32 = self.levels[codes]
        return found

    def stored(self, codes: U8) -> NDArray[Any]:
        """Codes as an array of this float's type."""
        return np.ascontiguousarray(codes).view(self.storage)


E4M3 = SmallFloat("e4m3", 8, 3, -6, 448.0, np.dtype(ml_dtypes.float8_e4m3fn))
E2M1 = SmallFloat("e2m1", 4, 1, 0, 6.0, np.dtype(ml_dtypes.float4_e2m1fn))
