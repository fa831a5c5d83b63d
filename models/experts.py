"""Mixtures of experts as plain linears: what transformers packs in three-dimensional tensors goes by a name each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert of a mixture as three plain linears: W_down (act(x W_gateᵀ) · (x W_upᵀ))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """Experts side by side: Σ_e p_e expert_e(x), every expert computed on every token as the graph does it."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden]; chosen, weights [tokens, k]: the experts of each token and their shares."""
        total = torch.zeros_like(x)
        for index, expert in enumerate(self):
            share = (weights * (chosen == index)).sum(-1, keepdim=True).to(x.dtype)
            total = total + expert(x) * share
        return total


def unpack_experts(model: Any) -> None:
    """Replace the experts that transformers packs in three-dimensional tensors by plain linears on the same memory."""
    for parent in list(model.modules()):
        packed: Any = getattr(parent, "experts", None)
        if getattr(getattr(packed, "gate_up_proj", None), "ndim", 0) == 3:
            experts = []
            for gate_up, down in zip(packed.gate_up_proj.data, packed.down_proj.data, strict=True):
                gate, up = gate_up.chunk(2)
                experts.append(Expert(gate, up, down, packed.act_fn))
            parent.experts = Experts(experts)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@contextmanager
def peft_sees_linears(model: nn.Module) -> Iterator[None]:
    """Let peft wrap and load adapters of unpacked experts as those of any linears, while the context is open.

    By the name of the architecture it would take them for adapters of transformers' packed experts, and convert them.
    """
    if not any(isinstance(module, Experts) for module in model.modules()):
        yield
        return
    from peft.utils import transformers_weight_conversion as conversion

    plain = conversion.get_checkpoint_conversion_mapping
    conversion.get_checkpoint_conversion_mapping = lambda *arguments, **options: None
    try:
        yield
    finally:
        conversion.get_checkpoint_conversion_mapping = plain
