"""Adapters that pool their input or repeat their output, put into the places of peft's lora_A and lora_B.

peft's own `lora.Linear` then computes y + c lora_B(lora_A(x)), saves and loads; only what the two modules do differs:

* QA-LoRA (arXiv 2309.14717): A [r, G] acts on sums over `pool` inputs, so that ΔW is one offset per output and block
  and merges into zero points. With `repeat` > 1 rows share offsets too (QA-BLoRA, TACL 2025, 2025.tacl-1.40).
* QA-HiRA (arXiv 2407.17029): fixed sums and one matrix C [out/repeat, G]; with pool = group size and repeat = 1 these
  are the zero points themselves, trained.
* Q-BaRA (ibid.): means over p inputs, rank p·r, every output p times: LoRA's number of parameters at p times the rank.

A saved model holds the compact matrices; `delta_of` gives the factors of the plain LoRA that is equal to them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from rqc.models.adapter_basis import POOLED
from rqc.models.delta import Delta
from rqc.runtime.errors import SchemeError

__all__ = ["BlockSums", "PooledIn", "RepeatOut", "attach", "delta_of", "set_factors"]


class BlockSums(nn.Module):
    """x [..., in] to sums over `pool` inputs in a row [..., ceil(in / pool)], the last over what is left."""

    weight: Tensor

    def __init__(self, in_features: int, pool: int) -> None:
        super().__init__()
        self.in_features, self.pool = in_features, pool
        # Without elements: peft asks a lora_A in which type it computes.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return block_sums(x, self.pool)

    def dense(self) -> Tensor:
        """The block indicator [ceil(in / pool), in]."""
        blocks = torch.arange(self.in_features) // self.pool
        return F.one_hot(blocks).T.to(self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, pool={self.pool}"


class PooledIn(nn.Module):
    """x [..., in] to P(x) Aᵀ [..., rank]: P takes sums (or means) over `pool` inputs, A is [rank, ceil(in / pool)]."""

    def __init__(self, in_features: int, rank: int, pool: int, *, mean: bool = False) -> None:
        """Draws A so that A P(x) starts with the variance that LoRA's A x has for independent inputs."""
        super().__init__()
        self.in_features, self.pool, self.mean = in_features, pool, mean
        self.weight = nn.Parameter(torch.empty(rank, -(-in_features // pool)))
        bound = (pool if mean else 1) / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)

    @property
    def gain(self) -> float:
        """What a pooled input is multiplied with."""
        return 1 / self.pool if self.mean else 1.0

    def forward(self, x: Tensor) -> Tensor:
        pooled = block_sums(x, self.pool)
        return F.linear(pooled * self.gain if self.mean else pooled, self.weight)

    def dense(self) -> Tensor:
        """A's columns repeated [rank, in]; without the gain."""
        return self.weight.repeat_interleave(self.pool, dim=1)[:, : self.in_features]

    def extra_repr(self) -> str:
        rank = len(self.weight)
        return f"in_features={self.in_features}, rank={rank}, pool={self.pool}, {'mean' if self.mean else 'sum'}"


class RepeatOut(nn.Module):
    """t [..., rank] to t Bᵀ with every entry `times` in a row [..., out]; B is [out / times, rank], zero at first."""

    def __init__(self, rank: int, out_features: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.weight = nn.Parameter(torch.zeros(out_features // times, rank))

    def forward(self, t: Tensor) -> Tensor:
        out = F.linear(t, self.weight)
        return out.repeat_interleave(self.times, dim=-1) if self.times > 1 else out

    def dense(self) -> Tensor:
        """B's rows repeated [out, rank]."""
        return self.weight.repeat_interleave(self.times, dim=0)

    def extra_repr(self) -> str:
        rows, rank = self.weight.shape
        return f"rank={rank}, out_features={rows * self.times}, times={self.times}"


class FactoredDora(DoraLinearLayer):  # type: ignore[misc]
    """peft's DoRA, with ΔW from the factors: its own sends an identity matrix of A's compact width through them."""

    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Tensor:
        """B A [out, in] without gradient: DoRA's norm counts as a constant (arXiv 2402.09353, section 4.3)."""
        with torch.no_grad():
            return (_outer(lora_B) @ _inner(lora_A)) * _gain(lora_A)


def block_sums(x: Tensor, pool: int) -> Tensor:
    """x [..., in] to [..., ceil(in / pool)]: sums over `pool` entries in a row, the last over what is left."""
    missing = -x.shape[-1] % pool
    if missing:
        x = F.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], -1, pool).sum(-1)


def attach(model: nn.Module, kind: str, *, pool: int, repeat: int = 1, adapter: str = "default") -> None:
    """Turn the plain LoRA (or DoRA) that peft has just put into a model into one of `POOLED`.

    `pool` is the block size for "qalora" and "qahira" and Q-BaRA's p for "qbara"; `repeat` how many outputs share a
    row ("qbara": p too). Ranks and scales are those peft was given; QA-HiRA has neither. Changes nothing and raises
    SchemeError, naming the module, where p does not divide a layer or a module cannot be adapted this way.
    """
    if kind not in POOLED:
        raise SchemeError(f"adapter type {kind!r} pools nothing", hint=f"use one of {', '.join(POOLED)}")
    if kind == "qbara" and repeat == 1:
        repeat = pool
    if pool < 1 or repeat < 1 or (kind == "qbara" and repeat != pool):
        raise SchemeError(f"{kind} over {pool} inputs and {repeat} outputs", hint="1 or more; of Q-BaRA the same p")
    layers = {name: module for name, module in model.named_modules() if _adapts(module, adapter)}
    if not layers:
        raise SchemeError(f"no module of the model has an adapter {adapter!r}", hint="call get_peft_model first")
    for name, layer in layers.items():
        _check(name, layer, kind, pool, repeat)
    for layer in layers.values():
        _swap(layer, kind, pool, repeat, adapter)


def _adapts(module: nn.Module, adapter: str) -> bool:
    if not isinstance(module, LoraLayer):
        return False
    layer: Any = module
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _check(name: str, layer: Any, kind: str, pool: int, repeat: int) -> None:
    if not isinstance(layer, LoraLinear) or layer.fan_in_fan_out:
        raise SchemeError(f"{name} is no linear layer that {kind} can adapt", hint="leave it out of the targets")
    if layer.out_features % repeat:
        raise SchemeError(
            f"{name} has {layer.out_features} outputs, which {repeat} does not divide",
            hint="choose another number of repetitions or leave it out of the targets",
        )
    if kind == "qbara" and layer.in_features % pool:
        raise SchemeError(
            f"{name} has {layer.in_features} inputs, which {pool} does not divide",
            hint="choose another p or leave it out of the targets",
        )


def _swap(layer: Any, kind: str, pool: int, repeat: int, adapter: str) -> None:
    old = layer.lora_A[adapter].weight
    rank, inputs, outputs = layer.r[adapter], layer.in_features, layer.out_features
    inner: nn.Module
    if kind == "qalora":
        inner, outer = PooledIn(inputs, rank, pool), RepeatOut(rank, outputs, repeat)
    elif kind == "qbara":
        inner, outer = PooledIn(inputs, pool * rank, pool, mean=True), RepeatOut(pool * rank, outputs, repeat)
    else:
        inner, outer = BlockSums(inputs, pool), RepeatOut(-(-inputs // pool), outputs, repeat)
        layer.lora_alpha[adapter], layer.scaling[adapter] = rank, 1.0
    layer.lora_A[adapter] = inner.to(old).requires_grad_(old.requires_grad)
    layer.lora_B[adapter] = outer.to(old).requires_grad_(old.requires_grad)
    if adapter in layer.lora_magnitude_vector:
        dora = FactoredDora(fan_in_fan_out=False)
        dora.weight = layer.lora_magnitude_vector[adapter].weight
        layer.lora_magnitude_vector[adapter] = dora


def delta_of(layer: Any, adapter: str = "default") -> Delta:
    """ΔW of a `lora.Linear` as factors, exactly: plain LoRA, rsLoRA, DoRA and all of `POOLED`.

    Raises SchemeError for a bias in lora_B and for modules that are none of these.
    """
    inner, outer = layer.lora_A[adapter], layer.lora_B[adapter]
    if getattr(outer, "bias", None) is not None:
        raise SchemeError("an adapter with a bias is no change of a weight", hint="train with lora_bias=False")
    magnitude = None
    if adapter in layer.lora_magnitude_vector:
        magnitude = _float64(layer.lora_magnitude_vector[adapter].weight)
    return Delta(_float64(_inner(inner)), _float64(_outer(outer)), layer.scaling[adapter] * _gain(inner), magnitude)


def set_factors(layer: Any, delta: Delta, adapter: str = "default") -> None:
    """Start a plain LoRA layer from an update: A as it is, B such that the layer's own scale gives delta's.

    Raises SchemeError where the ranks differ or the layer pools.
    """
    inner, outer = layer.lora_A[adapter], layer.lora_B[adapter]
    factors = (delta.a, delta.b * (delta.scale / layer.scaling[adapter]))
    for module, factor in zip((inner, outer), factors, strict=True):
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != factor.shape:
            raise SchemeError(
                f"an update of rank {delta.rank} does not fit {type(module).__name__} {list(module.weight.shape)}",
                hint="initialize plain LoRA of the same rank",
            )
    with torch.no_grad():
        for module, factor in zip((inner, outer), factors, strict=True):
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(factor)))


def _inner(module: nn.Module) -> Tensor:
    """A [r, in] without its gain."""
    return module.dense() if isinstance(module, (PooledIn, BlockSums)) else _weight(module)


def _outer(module: nn.Module) -> Tensor:
    """B [out, r]."""
    return module.dense() if isinstance(module, RepeatOut) else _weight(module)


def _weight(module: nn.Module) -> Tensor:
    if not isinstance(module, nn.Linear):
        raise SchemeError(f"{type(module).__name__} is no part of an adapter known here", hint="train plain LoRA")
    return module.weight


def _gain(module: nn.Module) -> float:
    return module.gain if isinstance(module, PooledIn) else 1.0


def _float64(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()
