"""Keys and values on the grid of an engine's cache, in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqc.models.online import before_attention
from rqc.models.token_grid import TokenGrid

F32 = NDArray[np.float32]


class CacheGrid(Protocol):
    """The grid of keys, or of values, of one layer."""

    def codes(self, x: F32) -> NDArray[np.int16]:
        """Codes of x [..., kv heads, tokens, size]; x that lies on the grid keeps its codes."""

    def round(self, x: F32) -> F32:
        """x on the grid."""


@dataclass(frozen=True, eq=False)
class StaticCacheGrid:
    """x ≈ s clamp(round(x / s), −128, 127) with s [kv heads, 1, size]; as the kernel has it, 1 / s is rounded first."""

    scales: F32

    def codes(self, x: F32) -> NDArray[np.int16]:
        """int8 codes of x."""
        return np.asarray(np.clip(np.rint(x * (np.float32(1) / self.scales)), -128, 127), np.int16)

    def round(self, x: F32) -> F32:
        """x on the grid."""
        return self.codes(x).astype(np.float32) * self.scales


@dataclass(frozen=True, eq=False)
class TokenCacheGrid:
    """x − m on an asymmetric grid of its own for each token and `group` channels of a head; m [kv heads, 1, size]."""

    bits: int
    group: int
    mean: F32 = field(default_factory=lambda: np.zeros((1, 1, 1), np.float32))

    def codes(self, x: F32) -> NDArray[np.int16]:
        """Codes of x, counted from their zero points."""
        return self._grid.codes(self._groups(x))[0].reshape(x.shape)

    def round(self, x: F32) -> F32:
        """x on the grid, so that it keeps its codes: rounding once more moves a token whose ends were both ties, which
        take one step less than the grid has."""
        return self._grid.round(self._grid.round(self._groups(x))).reshape(x.shape) + self.mean

    @property
    def _grid(self) -> TokenGrid:
        return TokenGrid(self.bits, symmetric=False)

    def _groups(self, x: F32) -> F32:
        return (x - self.mean).reshape(*x.shape[:-1], -1, self.group)


@dataclass
class CacheErrors:
    """What rounding did to the keys and values of each layer so far: the largest ‖x̂ − x‖ / ‖x‖ of a sequence."""

    by_layer: dict[int, float] = field(default_factory=dict)

    def add(self, layer: int, x: F32, rounded: F32) -> None:
        """Count the keys, or the values, of one sequence."""
        error = float(np.linalg.norm(rounded - x) / max(float(np.linalg.norm(x)), 1e-30))
        self.by_layer[layer] = max(error, self.by_layer.get(layer, 0.0))

    @property
    def largest(self) -> float:
        """That of the layer where it is largest."""
        return max(self.by_layer.values(), default=0.0)


def quantize_cache(model: Any, grids: Mapping[int, tuple[CacheGrid, CacheGrid]]) -> CacheErrors:
    """Let every attention of a transformers model read keys, behind RoPE and R3, and values on their layer's grids, and
    count what that changes from then on."""
    errors = CacheErrors()

    def step(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounded = []
        for grid, x in zip(grids[layer], (key.numpy(), value.numpy()), strict=True):
            rounded.append(grid.round(x))
            errors.add(layer, x, rounded[-1])
        return query, torch.from_numpy(rounded[0]), torch.from_numpy(rounded[1])

    before_attention(model, step)
    return errors
