"""LoRA-RITE (arXiv 2410.20625): an optimizer of LoRA's pairs that sees their product alone.

The same update B A has many factors: T A and B T⁻¹ for any invertible T. Adam moves the product differently for each of
them; this optimizer moves it alike. Of Z = X Yᵀ, where X is the one factor (Aᵀ or B, tall) and Y the other,

* Y = U R with orthonormal U, and G̃ = ∇X R⁻¹ = ∇Z U is a gradient without Y's magnitude;
* what is remembered is carried into today's basis by P = Uᵀ U_before: M ← M Pᵀ, V ← P V Pᵀ, and ρ gathers by how much
  V's eigenvalues shrank on the way;
* S = G̃ (V + ρ I)^(−1/2), M is the running mean of S, and X ← X − η M R⁻ᵀ moves Z by −η M Uᵀ.

Where the paper's sketch leaves a choice: V is Adam's decaying mean with its correction for a short past, taken over the
rows of G̃, so that S has entries of the size that Adam's has and η means what it means there. Both factors move at once.
Where Y has no column of its own in some direction (all of B at the start) R⁻¹ is the pseudo-inverse: X stays there, as
its gradient says. Gradients are cut by the norm of all G̃, since that of ∇A and ∇B depends on the factors. A step whose
product dX dYᵀ outweighs dX Yᵀ + X dYᵀ, for which it was made, is shortened until it doesn't; that is of Z alone, too.
All this is exact where each of A and B has full rank or is zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rqc.runtime.errors import SchemeError

__all__ = ["LoraRite"]

Pair = tuple[nn.Parameter, nn.Parameter]
_TOGETHER = 16
"""Pairs of one shape that are stepped as one batch of matrices."""
_FLAT = 1e-5
"""Directions whose gradients are below this share of the largest ones are rounding, and stay small."""
_RANK = 32.0
"""A singular value of fewer units in the last place of the largest one is none."""


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE on pairs (A [r, a], B [b, r]), pooled ones too; AdamW on other parameters, such as DoRA's magnitudes.

    Computes in the parameters' own type, and in float64 what is r x r. A factor's state: the steps that had a basis,
    that basis, and in it momentum, a root of V, and ρ (escaped).
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        others: Iterable[nn.Parameter] = (),
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ) -> None:
        """max_grad_norm: length that longer gradients, of pairs those without magnitudes, are cut to; 0 for none.
        weight_decay: decoupled. Raises SchemeError for factors that do not fit together.
        """
        flat: list[nn.Parameter] = []
        for a, b in pairs:
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise SchemeError(
                    f"A {list(a.shape)} and B {list(b.shape)} are no factors of one update",
                    hint="A is [r, in] and B is [out, r]",
                )
            flat += [a, b]
        groups = [{"params": flat, "paired": True}, {"params": list(others), "paired": False}]
        self.max_grad_norm = max_grad_norm
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        paired: list[tuple[dict[str, Any], _Pairs]] = []
        single: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if group["paired"]:
                paired += [(group, _Pairs(pairs)) for pairs in _batches(group["params"])]
            else:
                single += [(group, each, each.grad) for each in group["params"] if each.grad is not None]
        cut = self._cut([each for _, pairs in paired for each in pairs.gradients] + [each for _, _, each in single])
        for group, pairs in paired:
            self._step_pairs(group, pairs, cut)
        for group, parameter, gradient in single:
            _adamw(group, parameter, gradient * cut, self.state[parameter])
        return loss

    def _cut(self, gradients: Sequence[Tensor]) -> float:
        """What all gradients are multiplied with to have no more than the largest length."""
        if not self.max_grad_norm or not gradients:
            return 1.0
        squares = [each.double().square().sum().to(gradients[0].device) for each in gradients]
        length = float(torch.stack(squares).sum().sqrt())
        return min(1.0, self.max_grad_norm / (length + 1e-6))

    def _step_pairs(self, group: dict[str, Any], pairs: _Pairs, cut: float) -> None:
        """Move n pairs of one shape, both factors from where they stand."""
        moves, lengths = [], []
        for side in (0, 1):
            other = pairs.bases[1 - side]
            states = [self.state[each] for each in pairs.parameters[side]]
            direction = _direction(group, pairs.gradients[side] * cut, other, states)
            moves.append(-group["lr"] * direction @ other.inverse.mT)
            lengths.append(group["lr"] * direction.double().square().sum((-2, -1)).sqrt())
        first_order = lengths[0] + lengths[1]  # ‖dX Yᵀ‖ + ‖X dYᵀ‖
        grams = [(move.mT @ move).double() for move in moves]
        second_order = (grams[0] * grams[1]).sum((-2, -1)).clamp(min=0).sqrt()  # ‖dX dYᵀ‖
        share = torch.where(second_order > first_order, first_order / second_order, 1.0)[:, None, None]
        keep = 1 - group["lr"] * group["weight_decay"]
        for a, move in zip(pairs.parameters[0], (moves[0] * share.to(moves[0])).unbind(), strict=True):
            a.mul_(keep).add_(move.mT)
        for b, move in zip(pairs.parameters[1], (moves[1] * share.to(moves[1])).unbind(), strict=True):
            b.mul_(keep).add_(move)


class _Basis:
    """Y = U R of n matrices [n, m, r], in k = min(m, r) columns; zero where Y has no singular value.

    u [n, m, k]: orthonormal columns. inverse [n, r, k]: R's pseudo-inverse. exists [n]: 1 where Y is not zero, else 0.
    """

    def __init__(self, y: Tensor) -> None:
        q, triangle = torch.linalg.qr(y)
        w, sizes, vh = torch.linalg.svd(triangle.double(), full_matrices=False)
        present = sizes > sizes[:, :1] * (_RANK * torch.finfo(y.dtype).eps)
        self.u = q @ (w * present[:, None, :]).to(y)
        self.inverse = (vh.mT * torch.where(present, 1 / sizes, 0.0)[:, None, :]).to(y)
        self.exists = present[:, 0].to(y)


class _Pairs:
    """n pairs of one shape: parameters (A's, B's), their bases, and gradients without magnitude [n, m, k] of Aᵀ, B."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.parameters = ([a for a, _ in pairs], [b for _, b in pairs])
        self.bases = (
            _Basis(torch.stack([a.detach().mT for a, _ in pairs])),
            _Basis(torch.stack([b.detach() for _, b in pairs])),
        )
        self.gradients = (
            torch.stack([_gradient(a).mT for a, _ in pairs]) @ self.bases[1].inverse,
            torch.stack([_gradient(b) for _, b in pairs]) @ self.bases[0].inverse,
        )


def _batches(parameters: Sequence[nn.Parameter]) -> Iterator[list[Pair]]:
    """Pairs with a gradient, by shape, some at a time."""
    alike: dict[Any, list[Pair]] = defaultdict(list)
    for a, b in zip(parameters[::2], parameters[1::2], strict=True):
        if a.grad is not None or b.grad is not None:
            alike[a.shape, b.shape, a.dtype, a.device].append((a, b))
    for pairs in alike.values():
        for first in range(0, len(pairs), _TOGETHER):
            yield pairs[first : first + _TOGETHER]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _direction(group: dict[str, Any], gradient: Tensor, basis: _Basis, states: list[dict[str, Any]]) -> Tensor:
    """M̂ [n, m, k] in today's basis from G̃ [n, m, k]; the states become today's."""
    first, second = group["betas"]
    width = gradient.shape[-1]
    for state, g, u in zip(states, gradient, basis.u, strict=True):
        if not state:
            state |= {"steps": g.new_zeros(()), "escaped": g.new_zeros(()), "root": g.new_zeros(width, width)}
            state |= {"momentum": torch.zeros_like(g), "basis": torch.zeros_like(u)}
    before = {name: torch.stack([state[name] for state in states]) for name in states[0]}

    carry = basis.u.mT @ before["basis"]  # P
    held = before["root"].double()
    carried = carry.double() @ held
    lost = (_squares(held) - _squares(carried)).abs().amax(-1)  # columns of a root are V's eigenvectors
    escaped = second * (before["escaped"].double() + lost)
    scatter = (gradient.mT @ gradient).double() / gradient.shape[-2]
    values, vectors = torch.linalg.eigh(second * carried @ carried.mT + (1 - second) * scatter)
    values = values.clamp(min=0)

    steps = before["steps"] + basis.exists
    past = steps.double().clamp(min=1)[:, None]
    sizes = ((values + escaped[:, None]) / (1 - second**past)).sqrt()
    divisors = sizes + _FLAT * sizes[:, -1:] + group["eps"]
    whitened = gradient @ ((vectors / divisors[:, None, :]) @ vectors.mT).to(gradient)  # S
    momentum = first * before["momentum"] @ carry.mT + (1 - first) * whitened

    now = {"steps": steps, "escaped": escaped, "root": vectors * values.sqrt()[:, None, :]}
    now |= {"momentum": momentum, "basis": basis.u}
    for name, stacked in now.items():
        for state, each in zip(states, stacked.to(gradient).unbind(), strict=True):
            state[name] = each.clone()
    corrected: Tensor = momentum / (1 - first**past)[:, :, None].to(momentum)
    return corrected


def _squares(root: Tensor) -> Tensor:
    """The eigenvalues of root rootᵀ [n, k], in falling order."""
    values: Tensor = torch.linalg.svdvals(root)
    return values.square()


def _adamw(group: dict[str, Any], parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any]) -> None:
    """AdamW's step of a parameter that is no factor."""
    first, second = group["betas"]
    if not state:
        zero = torch.zeros_like(parameter)
        state |= {"steps": zero.new_zeros(()), "momentum": zero, "squares": zero.clone()}
    state["steps"] += 1
    state["momentum"].lerp_(gradient, 1 - first)
    state["squares"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    past = state["steps"].double()
    sizes = (state["squares"] / (1 - second**past).to(gradient)).sqrt() + group["eps"]
    mean = state["momentum"] / (1 - first**past).to(gradient)
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / sizes)
