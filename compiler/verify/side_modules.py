"""An engine's side paths in PyTorch, as they are stored: what a linear's kernel computes, and what is added to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rqc.compiler.verify.stored import StoredGraph
from rqc.compiler.verify.stored_sides import StoredBranch, StoredSide
from rqc.models.fake_quant import ActivationGrid
from rqc.models.reference import Part, Reference


def compute_as_stored(stored: StoredGraph, reference: Reference, sides: Mapping[str, StoredSide]) -> None:
    """Let peft's wrappers (and those of `wrap_sides`) compute y = linear(x) + x Eᵀ with the engine's side paths
    E [out, in], not their adapters; branches whose kernels round what they read are rounded too.

    Their hooks stay, and so does what they wrap.
    """
    found: dict[str, list[tuple[Part, Tensor, StoredSide]]] = defaultdict(list)
    for linear in stored.linears.values():
        for name in linear.names:
            part = reference.parts[name]
            if name in sides and part.module is not part.linear:
                rows, width = part.weight.shape
                side = sides[name]
                matrix = side.exact().dense((rows, width), stored.block(linear) if linear.quantized else width)
                found[part.path].append((part, torch.from_numpy(matrix).float(), side))
    for parts in found.values():
        wrapper: Any = parts[0][0].module
        wrapper.forward = _Beside(parts[0][0].linear, parts)


def wrap_sides(reference: Reference, sides: Mapping[str, StoredSide], *, branches: bool) -> None:
    """Give linears without an adapter a wrapper as peft's, for what runs beside them: corrections, and branches that
    are the engine's own."""
    for name, side in sides.items():
        part = reference.parts[name]
        if (side.corrections or (branches and side.branches)) and part.module is part.linear:
            reference.model.set_submodule(part.path, _Wrapper(part.linear))


class _Wrapper(nn.Module):
    """What stands for a linear, which hooks and `forward` are put on."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x)


class _Beside:
    """y = linear(x) + x Eᵀ + Σ round(round(x) aᵀ) bᵀ."""

    def __init__(self, linear: Any, parts: list[tuple[Part, Tensor, StoredSide]]) -> None:
        self.linear = linear
        self.matrix = torch.zeros_like(linear.weight)
        for part, matrix, _ in parts:
            self.matrix[part.rows] = matrix
        self.rounded = [(part.rows, _Rounded(branch)) for part, _, side in parts for branch in side.rounded]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        y = y + nn.functional.linear(x, self.matrix)
        for rows, branch in self.rounded:
            y[..., rows] += branch(x)
        return y


class _Rounded:
    """A branch of codes at int8 accumulation: a kernel of codes rounds what it reads, per token and block."""

    def __init__(self, branch: StoredBranch) -> None:
        self.a, self.b = (torch.from_numpy(np.ascontiguousarray(factor)).float() for factor in (branch.a, branch.b))
        self.grids = [None if block is None else ActivationGrid(8, block) for block in branch.blocks]

    def __call__(self, x: Tensor) -> Tensor:
        for factor, grid in zip((self.a, self.b), self.grids, strict=True):
            x = nn.functional.linear(x if grid is None else grid.round(x.detach()), factor)
        return x
