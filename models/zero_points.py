"""Zero-point merge: an update that is constant inside every block moves the zero points, not the codes or scales.

ΔW pooled at the block size is one offset D [N, G] per row and block, so Ŵ + ΔW = s (q − z) + D = s (q − z′) with
z′ = z − D / s (QA-LoRA, arXiv 2309.14717). z′ is real and leaves the range of codes freely, where kernels want
integers in it; rounding it loses much of the adapter. So the nearest integer zr in range is stored, and what is left
is added on the block sums P_g(x) of the input:

    y = x s (q − zr)ᵀ + P_g(x) corrᵀ,   corr = D + s (zr − z)

which is exact for any zr.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rqc.models.delta import Delta
from rqc.models.packing import F32, U8, Quantized
from rqc.runtime.errors import InputError

F64 = npt.NDArray[np.float64]


def compact_inputs(delta: Delta, block: int) -> F64:
    """A's columns [r, G], one for each block of inputs; the last block may be partial.

    Raises InputError for an update that is not constant inside blocks: it has no zero points to go into.
    """
    pooled = delta.pooled(block)
    if pooled is None:
        raise InputError(
            f"the update is not constant inside blocks of {block} inputs, so it cannot move zero points",
            hint="use --merge branch, or train a pooled adapter (qalora, qahira) at the group size of the engine",
        )
    return pooled


def block_offsets(delta: Delta, block: int) -> F64:
    """D [N, G] of an update that is constant inside every block of inputs. Raises InputError for one that is not."""
    offsets: F64 = (delta.scale * delta.b) @ compact_inputs(delta, block)
    return offsets


def real_zero_points(quantized: Quantized, offset: F64) -> F64:
    """z′ = z − D / s [N, G]; z where a block's scale is 0, since no zero point reaches it."""
    s, z = quantized.scales.astype(np.float64), _zeros(quantized)
    moved: F64 = z - np.divide(offset, s, out=np.zeros_like(offset), where=s != 0)
    return moved


def merge_zero_points(quantized: Quantized, offset: F64) -> tuple[U8, F32]:
    """zr [N, G], the integer zero points nearest to z′ in the range of the storage, and corr [N, G], the rest.

    Raises InputError if the rest is no float32.
    """
    moved = real_zero_points(quantized, offset)
    highest = (1 << quantized.storage_bits) - 1
    rounded = np.clip(np.rint(moved), 0, highest)
    rest = offset + quantized.scales.astype(np.float64) * (rounded - _zeros(quantized))
    with np.errstate(over="ignore"):  # told below
        correction = rest.astype(np.float32)
    if not np.isfinite(correction).all():
        raise InputError("the update is not finite (NaN, infinity or beyond float32)", hint="train the adapter anew")
    return rounded.astype(np.uint8), correction


def with_zero_points(quantized: Quantized, zero_points: U8) -> Quantized:
    """The same codes and scales around other zero points; what pads the last block stays, bit for bit."""
    return replace(quantized, zero_points=zero_points, padding=quantized.pad_codes())


def _zeros(quantized: Quantized) -> F64:
    return quantized.stored_zero_points().astype(np.float64)
