"""Optimizers that know of A and B; AdamW, which doesn't, is transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from rqc.compiler.finetune.settings import Settings
from rqc.models.lora_rite import LoraRite

LORA_PLUS_RATIO = 16
"""How much faster LoRA+ trains B than A: what its authors use."""


class LoraFA(torch.optim.AdamW):
    """LoRA-FA (arXiv 2308.03303): A stays as it is drawn, and AdamW moves B by the projected gradient.

    c B A with A fixed reaches the full gradient G of W best with G_B (A Aᵀ)⁻¹ / c², where G_B = c G Aᵀ is B's own
    gradient. peft has this optimizer too, but multiplies in bfloat16 wherever the processor can.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """model: with adapters whose A has no gradient. options: AdamW's."""
        super().__init__([each for each in model.parameters() if each.requires_grad], **options)
        self._projections = [_projection(layer) for layer in model.modules() if isinstance(layer, LoraLayer)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """AdamW's step on projected gradients."""
        for b, projection in self._projections:
            if b.grad is not None:
                b.grad.copy_(b.grad @ projection.to(b.grad))
        return super().step(closure)


def _projection(layer: Any) -> tuple[Tensor, Tensor]:
    """B's parameter, and (A Aᵀ)⁺ / c² [r, r]; the pseudo-inverse where A has fewer columns than rows."""
    inner = layer.lora_A["default"]
    a = (inner.weight if isinstance(inner, nn.Linear) else inner.dense()).detach().double()
    return layer.lora_B["default"].weight, torch.linalg.pinv(a @ a.T, hermitian=True) / layer.scaling["default"] ** 2


def make_optimizer(model: Any, settings: Settings, kind: type, options: dict[str, Any]) -> Any:
    """The optimizer of the settings; None for plain AdamW, whose type and options are given."""
    if settings.optimizer == "lora-plus":
        plus = {"loraplus_lr_ratio": LORA_PLUS_RATIO, "loraplus_weight_decay": settings.weight_decay}
        return create_loraplus_optimizer(model, kind, **options, **plus)
    if settings.optimizer == "lora-fa":
        return LoraFA(model, **options, weight_decay=settings.weight_decay)
    if settings.optimizer == "lora-rite":
        return _lora_rite(model, settings, options)
    return None


def _lora_rite(model: nn.Module, settings: Settings, options: dict[str, Any]) -> LoraRite:
    """LoRA-RITE on every A and B of the model; magnitudes are what is left. It cuts gradients itself."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    factors = {id(each) for pair in pairs for each in pair}
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in factors]
    decay, longest = settings.weight_decay, settings.max_grad_norm
    return LoraRite(pairs, others, **options, weight_decay=decay, max_grad_norm=longest)
