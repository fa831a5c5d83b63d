"""Signed codes under positive scales, the only ones that some kernels read, of any quantized weight: exactly.

(q − z) s = c s′ + l, the same l for a whole block. With C the centre of the storage:

* s ≥ 0: c = q − C, s′ = s, l = s (C − z).
* s < 0: c = C − 1 − q, s′ = −s, l = −s (z − C + 1). Codes of b bits have no −(−2^(b−1)), so they move by one.
* s = 0: c = 0, l = 0.

What is left, l, is the same for all inputs of a block: it multiplies the block sums of x, as the correction of a merged
zero point does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rqc.models.packing import F32, Quantized, by_block

LEAST_SCALE = 2.0**-24
"""The smallest positive float16. A block of zeros has no scale of its own, and kernels want one above 0."""


def signed_codes(quantized: Quantized) -> NDArray[np.int8]:
    """c, int8 [N, K]."""
    center = 1 << (quantized.storage_bits - 1)
    codes = (quantized.codes.astype(np.int16) - center).astype(np.int8)
    if not (quantized.scales > 0).all():
        for part, groups in by_block(codes, quantized.block_size):
            scales = quantized.scales[:, groups, None]
            # −c − 1 is the complement of c's bits
            np.bitwise_xor(part, -(scales < 0).astype(np.int8), out=part)
            np.multiply(part, (scales != 0).astype(np.int8), out=part)
    return codes


def positive_scales(quantized: Quantized) -> F32:
    """s′, float32 [N, G], none below `LEAST_SCALE`."""
    return np.maximum(np.abs(quantized.scales), np.float32(LEAST_SCALE))


def left_over(quantized: Quantized) -> F32:
    """l, float32 [N, G]; zeros for a symmetric grid whose scales are positive."""
    center = 1 << (quantized.storage_bits - 1)
    below = center - quantized.stored_zero_points().astype(np.float32)
    return np.asarray(np.where(quantized.scales < 0, quantized.scales * (below - 1), quantized.scales * below))
