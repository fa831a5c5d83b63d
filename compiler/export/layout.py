"""GPTQ's layout of a linear W [N, K], Ŵ = (q − 8) s, which other runtimes read.

qweight int32 [K/8, N], eight codes of consecutive inputs to a word, the first in the lowest bits; qzeros int32
[G, N/8], every nibble 7 (the format stores z − 1); scales float16 [G, N], of either sign; g_idx int32 [K], the group of
each input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rqc.models.description import Description
from rqc.models.packing import Quantized, by_block
from rqc.runtime.errors import CheckpointError

BITS, CENTER = 4, 8
GROUP_SIZES = (256, 128, 64, 32, 16, -1)
KEPT = "an engine keeps them: rqc compile, rqc run"
Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the checkpoint to be: its value is made when its shard is written."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    value: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass
class ScaleRounding:
    """What storing scales in float16 did: the largest ‖Ŵ₁₆ − Ŵ‖ / ‖Ŵ‖ of a linear; and how many scales are negative,
    of how many."""

    error: float = 0.0
    negative: int = 0
    scales: int = 0

    def notes(self) -> Iterator[str]:
        """What readers should know of them."""
        if self.negative:
            yield (
                f"{self.negative / self.scales:.0%} of the scales are negative, as in the engine: kernels that round "
                "activations to int8 may misread them (an engine of --target tensorrt-rtx --portable has none)"
            )

    def half(self, stem: str, quantized: Quantized, groups: int) -> NDArray[np.float16]:
        """scales float16 [groups, N] of a linear. Raises CheckpointError for one beyond float16."""
        with np.errstate(over="ignore"):  # told below
            half = quantized.scales.astype(np.float16)
        if not np.isfinite(half).all():
            raise CheckpointError(f"{stem} has scales beyond float16, which the layout stores", hint=KEPT)
        energy = _energy(quantized)
        exact, stored = quantized.scales.astype(np.float64), half.astype(np.float64)
        norm = float((energy * exact**2).sum())
        off = float((energy * (stored - exact) ** 2).sum())
        self.error = max(self.error, float(np.sqrt(off / norm)) if norm else 0.0)
        self.negative += int((half[:, :groups] < 0).sum())
        self.scales += len(half) * groups
        return np.ascontiguousarray(half[:, :groups].T)


def linear_tensors(
    stem: str, shape: tuple[int, int], group_size: int, read: Callable[[], Quantized], rounding: ScaleRounding
) -> Iterator[Tensor]:
    """The four tensors of a linear [N, K] whose codes `read` gives; of one group (-1), all its scales of a row are
    equal."""
    n, k = shape
    per_group = k if group_size == -1 else group_size
    groups = k // per_group
    yield Tensor(f"{stem}.qweight", (k // 8, n), np.int32, lambda: packed_codes(read()))
    yield Tensor(f"{stem}.qzeros", (groups, n // 8), np.int32, lambda: np.full((groups, n // 8), 0x77777777, np.int32))
    yield Tensor(f"{stem}.scales", (groups, n), np.float16, lambda: rounding.half(stem, read(), groups))
    yield Tensor(f"{stem}.g_idx", (k,), np.int32, lambda: (np.arange(k) // per_group).astype(np.int32))


def packed_codes(quantized: Quantized) -> NDArray[np.int32]:
    """qweight int32 [K/8, N]."""
    codes = quantized.codes.T.astype(np.uint32)
    words = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for place in range(8):
        words |= codes[place::8] << np.uint32(4 * place)
    return words.view(np.int32)


def half(name: str, values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Values in float16. Raises CheckpointError for one beyond it."""
    with np.errstate(over="ignore"):  # told below
        stored = np.ascontiguousarray(values.astype(np.float16))
    if not np.isfinite(stored).all():
        raise CheckpointError(f"{name} has values beyond float16, in which it would be stored", hint=KEPT)
    return stored


def misfit(description: Description, group_size: int) -> tuple[str, str] | None:
    """Why the linears of a model do not fill whole groups and words, and flags of a group size that all of them do
    (or nothing); None where they do."""
    shapes = {claim.weight: description.shape(claim) for claim in description.claims if claim.quantized}

    def unfit(size: int) -> list[str]:
        return [name for name, (n, k) in shapes.items() if k % (k if size == -1 else size) or n % 8 or k % 8]

    if not (names := unfit(group_size)):
        return None
    n, k = shapes[names[0]]
    fit = [size for size in GROUP_SIZES if not unfit(size)]
    reason = f"{names[0]} [{n}, {k}] in groups of {k if group_size == -1 else group_size}"
    return f"{reason}: GPTQ has whole groups and eight codes to a word", f"--group-size {fit[0]}" if fit else ""


def _energy(quantized: Quantized) -> NDArray[np.float64]:
    """Σ (q − 8)² of every block, [N, G]."""
    found = np.empty(quantized.scales.shape)
    for codes, groups in by_block(quantized.codes, quantized.block_size):
        found[:, groups] = np.square(codes.astype(np.float32) - CENTER).sum(axis=-1)
    return found
