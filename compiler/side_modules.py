"""An engine's side paths in PyTorch, as they are stored: what a linear's kernel computes, and what is added to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rqc.compiler.stored import StoredGraph
from rqc.compiler.stored_sides import StoredSide
from rqc.models.reference import Part, Reference


def compute_as_stored(stored: StoredGraph, reference: Reference, sides: Mapping[str, StoredSide]) -> None:
    """Let peft's wrappers (and those of `wrap_corrected`) compute y = linear(x) + x Eᵀ with the engine's side paths
    E [out, in], not their adapters.

    Their hooks stay, and so does what they wrap.
    """
    found: dict[str, list[tuple[Part, Tensor]]] = defaultdict(list)
    for linear in stored.linears.values():
        for name in linear.names:
            part = reference.parts[name]
            if name in sides and part.module is not part.linear:
                rows, width = part.weight.shape
                matrix = sides[name].dense((rows, width), stored.block(linear) if linear.quantized else width)
                found[part.path].append((part, torch.from_numpy(matrix).float()))
    for parts in found.values():
        wrapper: Any = parts[0][0].module
        wrapper.forward = _Beside(parts[0][0].linear, parts)


def wrap_corrected(reference: Reference, sides: Mapping[str, StoredSide]) -> None:
    """Give linears with corrections, but without an adapter, a wrapper as peft's, for what runs beside them."""
    for name, side in sides.items():
        part = reference.parts[name]
        if side.corrections and part.module is part.linear:
            reference.model.set_submodule(part.path, _Wrapper(part.linear))


class _Wrapper(nn.Module):
    """What stands for a linear, which hooks and `forward` are put on."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x)


class _Beside:
    """y = linear(x) + x Eᵀ."""

    def __init__(self, linear: Any, parts: list[tuple[Part, Tensor]]) -> None:
        self.linear = linear
        self.matrix = torch.zeros_like(linear.weight)
        for part, matrix in parts:
            self.matrix[part.rows] = matrix

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + nn.functional.linear(x, self.matrix)
