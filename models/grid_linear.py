"""A linear layer on a quantized weight: the codes, scales and zero points that are deployed, packed in memory.

The weight exists in floating point only while a product needs it, a slab of rows at a time, and again in the backward
pass: between the two nothing of its size is kept. Only the input gets a gradient (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.nf4 import LevelQuantized, NormalFloat, quantize_levels
from rqc.models.packing import unpack
from rqc.runtime.errors import SchemeError

__all__ = ["FixedWeight", "GridLinear"]

_SLAB = {"cpu": 1 << 22}
"""Weights dequantized at a time, per kind of device: 16 MiB as float32; elsewhere the launches of kernels cost more."""
_SLAB_ELSEWHERE = 1 << 26
_WORDS = {2: torch.complex128, 4: torch.int64}
"""Types as wide as the float32 values of one byte's codes, by bits: levels are looked up a byte at a time."""


class FixedWeight(torch.Tensor):
    """What `GridLinear.weight` gives: a copy. Assigning to its `data`, as peft's merge does, would do nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as nn.Parameter does

    @property
    def data(self) -> Tensor:
        """The values, as any tensor's."""
        return self.detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Raises SchemeError."""
        raise SchemeError(
            "a quantized base cannot take weights of an adapter: its codes are fixed",
            hint="save the adapter and merge it with `rqc compile --adapter`",
        )


@dataclass(frozen=True, eq=False)
class _Packed:
    """A packed weight [N, K] as tensors of one device: value = (code - zero point) * scale, or level[code] * scale."""

    codes: Tensor
    """uint8 [N, G, block * bits / 8]."""
    scales: Tensor
    """float32 [N, G]."""
    zero_points: Tensor | None
    """uint8 [N, ceil(G * bits / 8)]; None: 2^(bits - 1) everywhere."""
    levels: Tensor | None
    """float32 [2^bits]; None: the codes' own values."""
    bits: int
    k: int

    def slabs(self) -> list[slice]:
        """Rows that are dequantized together."""
        n, step = len(self.codes), max(1, _SLAB.get(self.codes.device.type, _SLAB_ELSEWHERE) // self.k)
        return [slice(i, min(i + step, n)) for i in range(0, n, step)]

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the weight [n, K], computed in float32 as `Quantized.dequantize` does, then cast."""
        scales = self.scales[rows]
        values = self._values(self.codes[rows])  # [n, G, block]
        if self.levels is None:
            values.sub_(self._centers(rows))
        values.mul_(scales[..., None])
        return values.flatten(1)[:, : self.k].to(dtype)

    def _values(self, codes: Tensor) -> Tensor:
        per_byte = 8 // self.bits
        if self.levels is not None:
            every = torch.arange(256, dtype=torch.uint8, device=codes.device)
            table = self.levels[_split(every[:, None], self.bits).int()].view(_WORDS[self.bits])[:, 0]
            words = torch.index_select(table, 0, codes.flatten().int())
            return words.view(torch.float32).view(*codes.shape[:2], -1)
        out = torch.empty((*codes.shape, per_byte), dtype=torch.float32, device=codes.device)
        for i in range(per_byte):
            out[..., i] = _field(codes, i, self.bits)
        return out.flatten(2)

    def _centers(self, rows: slice) -> Tensor | float:
        if self.zero_points is None:
            return float(1 << (self.bits - 1))
        points = _split(self.zero_points[rows], self.bits)[:, : self.scales.shape[1]]
        return points.float()[..., None]


def _field(packed: Tensor, index: int, bits: int) -> Tensor:
    """The index-th code of every byte."""
    if bits == 8:
        return packed
    shifted = packed >> (index * bits) if index else packed
    return shifted if (index + 1) * bits == 8 else shifted & ((1 << bits) - 1)


def _split(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., m] to codes [..., m * 8 / bits]."""
    return torch.stack([_field(packed, i, bits) for i in range(8 // bits)], dim=-1).flatten(-2)


class _Product(torch.autograd.Function):
    """x Wᵀ + b. Keeps the packed weight alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: _Packed) -> Tensor:
        ctx.packed = packed
        flat = x.reshape(-1, packed.k)
        out = flat.new_empty(len(flat), len(packed.codes))
        bias = None if bias is None else bias.to(x.dtype)
        for rows in packed.slabs():
            w = packed.rows(rows, x.dtype).t()
            if bias is None:
                torch.mm(flat, w, out=out[:, rows])
            else:  # the sum is rounded once
                torch.addmm(bias[rows], flat, w, out=out[:, rows])
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        packed: _Packed = ctx.packed
        grad = grads[0].reshape(-1, len(packed.codes))
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            first, *others = packed.slabs()
            of_x = grad[:, first] @ packed.rows(first, grad.dtype)
            for rows in others:
                of_x.addmm_(grad[:, rows], packed.rows(rows, grad.dtype))
            of_x = of_x.view(*grads[0].shape[:-1], packed.k)
        if ctx.needs_input_grad[1]:
            of_bias = grad.sum(0)
        return of_x, of_bias, None


class GridLinear(nn.Linear):
    """nn.Linear whose weight lies packed on a grid: float32, bfloat16 or float16 in, the same out; any device.

    Buffers, all integers, so that no cast of the model (`model.to(torch.bfloat16)`) touches them: `codes` and
    `zero_points` as the engine stores them, `scale_bits` and `level_bits` float32 values by their bit patterns.
    """

    codes: Tensor
    scale_bits: Tensor
    zero_points: Tensor | None
    level_bits: Tensor | None

    def __init__(self, quantized: Quantized | LevelQuantized, bias: Tensor | None = None) -> None:
        """Takes over the values; bias [N] becomes a parameter without gradient."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.bits = quantized.bits
        self.block_size = quantized.block_size
        self.register_buffer("codes", torch.from_numpy(quantized.packed_codes()))
        self.register_buffer("scale_bits", torch.from_numpy(quantized.scales.view(np.int32).copy()))
        self.register_buffer("zero_points", None)
        self.register_buffer("level_bits", None)
        if isinstance(quantized, LevelQuantized):
            self.register_buffer("level_bits", torch.from_numpy(quantized.levels.view(np.int32).copy()))
        elif quantized.zero_points is not None:
            self.register_buffer("zero_points", torch.from_numpy(quantized.packed_zero_points()))
        self.bias: Any = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_quantized(cls, quantized: Quantized | LevelQuantized, bias: Tensor | None = None) -> GridLinear:
        """A layer on codes that exist already."""
        return cls(quantized, bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, grid: Grid | NormalFloat) -> GridLinear:
        """Rounds a float layer to the grid; the result lives on its device.

        Raises CheckpointError where a weight is not finite.
        """
        w = linear.weight.detach().float().cpu().numpy()
        quantized = quantize_levels(w, grid) if isinstance(grid, NormalFloat) else quantize(w, grid)
        return cls(quantized, linear.bias).to(linear.weight.device)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A dequantized copy, float32 [N, K], whatever type the model has been cast to."""
        packed = self._packed()
        parts = [packed.rows(rows, torch.float32) for rows in packed.slabs()]
        return torch.cat(parts).as_subclass(FixedWeight)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero points (and levels)."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def quantized(self) -> Quantized | LevelQuantized:
        """The value that the layer was made from, from what it holds now."""
        n, k = self.out_features, self.in_features
        scales = self.scale_bits.cpu().numpy().view(np.float32).copy()
        storage = self._storage_bits
        codes = unpack(self.codes.cpu().numpy(), storage).reshape(n, -1)[:, :k].copy()
        if self.level_bits is not None:
            levels = self.level_bits.cpu().numpy().view(np.float32).copy()
            return LevelQuantized(codes, scales, levels, self.bits, self.block_size)
        zero_points = None
        if self.zero_points is not None:
            zero_points = unpack(self.zero_points.cpu().numpy(), storage)[:, : scales.shape[1]].copy()
        return Quantized(codes, scales, zero_points, self.bits, storage, self.block_size)

    @property
    def _storage_bits(self) -> int:
        return self.codes.shape[-1] * 8 // self.block_size

    def _packed(self) -> _Packed:
        levels = None if self.level_bits is None else self.level_bits.view(torch.float32)
        scales = self.scale_bits.view(torch.float32)
        return _Packed(self.codes, scales, self.zero_points, levels, self._storage_bits, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] to [..., N]; under autocast in its type."""
        device = input.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(input, self.bias, self._packed())  # type: ignore[no-untyped-call]
        return product

    def extra_repr(self) -> str:
        """The form, behind nn.Linear's sizes."""
        kind = (
            "levels" if self.level_bits is not None else "asymmetric" if self.zero_points is not None else "symmetric"
        )
        return f"{super().extra_repr()}, bits={self.bits}, block_size={self.block_size}, {kind}"
