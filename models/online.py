"""The online halves of a rotation in PyTorch: differentiable, on any device, and in front of whatever reads rotated x.

A hook sits on the module that stands at a linear's path when it is registered. peft moves a wrapped linear, hooks and
all, behind its wrapper, where the adapter no longer sees what they do: so wrap first, then register.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from rqc.models.rotation import Orthogonal
from rqc.runtime.errors import RotationError

AttentionStep = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
OWN = "rqc_"
"""How names of attention implementations begin that are a plain one with steps before it."""


class TorchRotation(nn.Module):
    """x ↦ x Q (x Qᵀ if `inverse`) on the last axis, computed in `dtype`, returned in the type of x.

    Q stays the small factors that it is made of: buffers that no checkpoint holds, that keep their type whatever the
    model is cast to, and that follow x from device to device.
    """

    def __init__(self, rotation: Orthogonal, *, inverse: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.n = rotation.n
        self.inverse = inverse
        self.dtype = dtype
        factors = [factor.T if inverse else factor for factor in rotation.factors]
        self._exact = {f"factor{index}": np.ascontiguousarray(factor) for index, factor in enumerate(factors)}
        if rotation.signs is not None:
            self._exact["signs"] = rotation.signs
        for name in self._exact:
            self.register_buffer(name, None, persistent=False)
        self._fill(torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] rotated. Raises RotationError for another n."""
        if x.shape[-1] != self.n:
            raise RotationError(
                f"a rotation of order {self.n} met shape {tuple(x.shape)}", hint="the last axis is rotated"
            )
        if self.device != x.device:
            self._fill(x.device)
        with torch.autocast(x.device.type, enabled=False):  # which would round a float32 rotation to half of its digits
            y = x.to(self.dtype)
            y = self._mixed(y) if self.inverse else self._mixed(self._signed(y))
            return (self._signed(y) if self.inverse else y).to(x.dtype)

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next(self.buffers()).device

    def extra_repr(self) -> str:
        """The order, and which way."""
        return f"{self.n}, inverse={self.inverse}, dtype={self.dtype}"

    def _mixed(self, x: Tensor) -> Tensor:
        """x (I kron F_1 kron F_2 ...): X [a, right] becomes Fᵀ X; right ends at 1."""
        factors = [factor for name, factor in self.named_buffers() if name != "signs"]
        right = int(np.prod([len(factor) for factor in factors]))
        y = x
        for factor in factors:
            order = len(factor)
            right //= order
            y = y.reshape(-1, order, right).transpose(1, 2) @ factor if right > 1 else y.reshape(-1, order) @ factor
            y = y.transpose(1, 2) if right > 1 else y
        return y.reshape(x.shape)

    def _signed(self, x: Tensor) -> Tensor:
        signs = self._buffers.get("signs")
        return x if signs is None else x * signs

    @torch.inference_mode(False)  # a buffer made in inference could not be trained through later
    def _fill(self, device: torch.device) -> None:
        for name, array in self._exact.items():
            setattr(self, name, torch.from_numpy(array.copy()).to(device, self.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchRotation:
        """`model.to(bfloat16)` moves the factors, but must not round them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device.type != "meta":
            self._fill(self.device)
        return self


def rotate_input(module: nn.Module, rotation: TorchRotation) -> None:
    """Let the module, as it stands there now, read its first argument rotated."""
    module.register_forward_pre_hook(lambda _, args: (rotation(args[0]), *args[1:]))


def rotate_output(module: nn.Module, rotation: TorchRotation) -> None:
    """Let the module, as it stands there now, give its output rotated."""
    module.register_forward_hook(lambda _, args, out: rotation(out))


def rotate_attention(model: Any, rotation: TorchRotation) -> None:
    """Let every attention of a transformers model see q R3 and k R3, which it gets after RoPE."""
    before_attention(model, lambda _, query, key, value: (rotation(query), rotation(key), value))


def before_attention(model: Any, step: AttentionStep) -> None:
    """Let every attention of a transformers model read what `step` makes of its layer and of q, k and v, each [batch,
    heads, tokens, size], k behind RoPE. A second step reads what the first one gives."""
    plain = model.config._attn_implementation
    if not plain.startswith(OWN):
        for module in _attentions(model):
            module.rqc_attention = _AttentionPath(plain)
        AttentionInterface.register(f"{OWN}{plain}", _changed_attention)
        AttentionMaskInterface.register(f"{OWN}{plain}", ALL_MASK_ATTENTION_FUNCTIONS[plain])
        model.config._attn_implementation = f"{OWN}{plain}"
    for module in _attentions(model):
        module.rqc_attention.steps.append(step)


@contextmanager
def watching_attention(model: Any) -> Iterator[dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """q, k and v behind all steps, and y [batch, tokens, heads, size], of every layer that has steps, by its number, in
    the last run while the context is open."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    paths = [module.rqc_attention for module in _attentions(model) if hasattr(module, "rqc_attention")]
    for path in paths:
        path.seen = seen
    try:
        yield seen
    finally:
        for path in paths:
            path.seen = None


@dataclass(eq=False)
class _AttentionPath:
    """What an attention's q, k and v pass: no module, so that it is no part of the model's tree."""

    plain: str
    steps: list[AttentionStep] = field(default_factory=list)
    seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None


def _attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]


def _changed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    path: _AttentionPath = module.rqc_attention
    for step in path.steps:
        query, key, value = step(module.layer_idx, query, key, value)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(path.plain, eager)
    out = attention(module, query, key, value, *args, **options)
    if path.seen is not None:
        path.seen[module.layer_idx] = (query, key, value, out[0])
    return out
