"""Activations on the deployed grid in PyTorch: rounded with a straight-through gradient in training, or rounded and
recorded, linear by linear, to compare an engine with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rqc.models.description import Description
from rqc.models.grid import Grid, activation_codes, fake_quantize_activations
from rqc.models.reference import Reference
from rqc.models.token_grid import TokenGrid

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class ActivationGrid:
    """Symmetric and dynamic: `bits` per code, one scale per token and block of inputs (-1: one per token)."""

    bits: int
    block: int

    def codes(self, x: F32) -> NDArray[np.int8]:
        """int8 codes of x [..., K]; x that lies on the grid keeps its codes."""
        return activation_codes(x, self.block, self.bits)[0]

    def round(self, x: Tensor) -> Tensor:
        """x [..., K] on the grid."""
        return torch.from_numpy(fake_quantize_activations(x.numpy(), self.block, self.bits))

    def read(self, x: F32) -> F32:
        """What the codes of x, which lies on the grid, stand for."""
        return fake_quantize_activations(x, self.block, self.bits)


@dataclass(frozen=True)
class GraphGrid:
    """Dynamic, per token, as the graph rounds: with zero points or without, clipped or not."""

    grid: TokenGrid

    def codes(self, x: F32) -> NDArray[np.int16]:
        """Codes of x [..., K], which lies on the grid, counted from the zero point."""
        return self.grid.read(x)[0]

    def round(self, x: Tensor) -> Tensor:
        """x [..., K] on the grid."""
        return torch.from_numpy(self.grid.round(x.numpy()))

    def read(self, x: F32) -> F32:
        """What the codes of x, which lies on the grid, stand for."""
        codes, scales = self.grid.read(x)
        return codes.astype(np.float32) * scales


@dataclass(frozen=True)
class StaticGrid:
    """Symmetric and static: int8 codes, one scale for the whole tensor; what lies beyond them is cut off."""

    scale: float

    def codes(self, x: F32) -> NDArray[np.int8]:
        """int8 codes of x; x that lies on the grid keeps its codes."""
        codes = np.rint(np.asarray(x, np.float32) / np.float32(self.scale))
        return np.asarray(np.clip(codes, -128, 127), np.int8)

    def round(self, x: Tensor) -> Tensor:
        """x on the grid."""
        return torch.from_numpy(self.read(x.numpy()))

    def read(self, x: F32) -> F32:
        """What the codes of x stand for."""
        return self.codes(x).astype(np.float32) * np.float32(self.scale)


InputGrid = ActivationGrid | GraphGrid | StaticGrid
"""How what a linear reads is rounded."""


class _StraightThrough(torch.autograd.Function):
    """Rounding forward, the identity backward: this grid clips nothing, so no gradient is cut."""

    @staticmethod
    def forward(context: Any, x: Tensor, grid: ActivationGrid) -> Tensor:
        width = x.shape[-1]
        block = width if grid.block == -1 else grid.block
        padded = nn.functional.pad(x.float(), (0, -width % block))
        blocks = padded.reshape(*x.shape[:-1], -1, block)
        top = torch.tensor(float(2 ** (grid.bits - 1) - 1), device=x.device)
        largest = blocks.abs().amax(-1, keepdim=True)
        # below this the reciprocal overflows: such a block is zero
        inverse = torch.where(largest > top / torch.finfo(torch.float32).max, top / largest, 0.0)
        rounded = torch.round(blocks * inverse) * (largest / top)
        return rounded.reshape(padded.shape)[..., :width].to(x.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize_ste(x: Tensor, grid: ActivationGrid) -> Tensor:
    """x [..., K] on the grid, to the last bit as `ActivationGrid.round` has it, in the type of x; gradients pass.

    Any device, any float type: computed in float32, as the kernels do.
    """
    rounded: Tensor = _StraightThrough.apply(x, grid)  # type: ignore[no-untyped-call]
    return rounded


def training_grids(description: Description, bits: int, group_size: int) -> dict[str, ActivationGrid]:
    """The grids on which an engine will have the inputs of the blocks' linears, by weight name; no router, no head.

    8 bits: per token and block of a weight's grid of `group_size` (MatMulNBits at accuracy level 4). Fewer: per token.
    """
    weights = Grid(8, group_size)
    return {
        claim.weight: ActivationGrid(bits, weights.block(description.shape(claim)[1]) if bits == 8 else -1)
        for claim in description.claims
        if claim.quantized
    }


def round_inputs_ste(reference: Reference, grids: Mapping[str, ActivationGrid], *, linear_alone: bool = False) -> None:
    """Round, in training, what the named linears and their adapters read (linear_alone: without these). Call it after
    `rotate_online`: the rounding comes behind the rotation. Parts of one module share a grid."""
    parts = {name: reference.parts[name] for name in grids}
    modules = {part.linear if linear_alone else part.module: grids[name] for name, part in parts.items()}
    for module, grid in modules.items():
        module.register_forward_pre_hook(lambda _, args, grid=grid: (fake_quantize_ste(args[0], grid), *args[1:]))


def quantize_inputs(reference: Reference, grids: Mapping[str, InputGrid], *, linear_alone: bool = False) -> None:
    """Round what the named linears read, behind the rotation before them if any. Parts of one module share a grid.

    linear_alone: what runs beside a linear in a wrapper, such as an adapter, reads x as it is.
    """
    memo = _Memo()
    done: set[int] = set()
    for name, grid in grids.items():
        module = reference.parts[name].linear if linear_alone else reference.parts[name].module
        if id(module) not in done:
            done.add(id(module))
            module.register_forward_pre_hook(lambda _, args, grid=grid: (memo.round(args[0], grid), *args[1:]))


@dataclass
class _Memo:
    """The last rounded input: q, k and v, gate and up read the same tensor one after the other."""

    key: tuple[Tensor, InputGrid] | None = None
    value: Tensor = field(default_factory=lambda: torch.empty(0))

    def round(self, x: Tensor, grid: InputGrid) -> Tensor:
        if self.key is None or self.key[0] is not x or self.key[1] != grid:
            self.key, self.value = (x, grid), grid.round(x)
        return self.value


@dataclass
class Recording:
    """What linears read, x [tokens, in] as they saw it, and wrote, y [tokens, out], for one sequence: by name."""

    inputs: dict[str, F32] = field(default_factory=dict)
    outputs: dict[str, F32] = field(default_factory=dict)


@contextmanager
def recording(reference: Reference, names: Iterable[str], wrapped: Collection[str] = ()) -> Iterator[Recording]:
    """Record the named linears while the context is open, those in `wrapped` with what wraps them, the others without;
    one run is kept, the last."""
    record = Recording()
    handles = []
    for name in names:
        part = reference.parts[name]
        module, rows = part.module if name in wrapped else part.linear, part.rows

        def keep(_: Any, args: tuple[Tensor, ...], out: Tensor, name: str = name, rows: slice = rows) -> None:
            record.inputs[name] = args[0].reshape(-1, args[0].shape[-1]).numpy()
            record.outputs[name] = out.reshape(-1, out.shape[-1])[:, rows].numpy()

        handles.append(module.register_forward_hook(keep))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
