"""Gradient descent on orthogonal matrices by Cayley steps, in float64.

Source: Li, Fuxin, Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform"
(arXiv 2002.01113), as SpinQuant (arXiv 2405.16406) uses it; for square matrices its projection is a skew part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-30


class CayleySGD:
    """Momentum on stacks of orthogonal matrices X [k, n, n], each stepped by itself.

    With G = dL/dX: M ← β M + G, Y = (M Xᵀ − X Mᵀ) / 2, M ← Y X (its part along the manifold), and
    X ← (I + α/2 Y)⁻¹ (I − α/2 Y) X with α = lr / ‖Y‖₁: lr is how far a step turns, whatever the scale of the loss, and
    less where no more is along the manifold than rounding makes of any gradient. (The sources have α = min(lr, 1/‖Y‖₁),
    which is the bound alone where gradients are large, as they are of a model's R1: then no schedule of lr is heard.)
    The Cayley transform of a skew matrix is orthogonal; what rounding leaves, Newton's step to the next orthogonal
    matrix takes away.
    """

    def __init__(
        self, matrices: Sequence[Tensor], moments: Sequence[Tensor], momentum: float, noise: float = 1e-9
    ) -> None:
        """Take over float64 stacks and their momenta M (0 at the start), which are changed in place. noise: the share
        ‖Y‖₁ / ‖M‖₁ that a gradient off the manifold has by the rounding of what it was computed in."""
        self.matrices, self.moments, self.momentum, self.noise = matrices, moments, momentum, noise

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step down the gradients dL/dX, float64 [k, n, n]. lr: the 1-norm of what is turned, 1 or less."""
        for x, moment, gradient in zip(self.matrices, self.moments, gradients, strict=True):
            moment.mul_(self.momentum).add_(gradient)
            y = skew(moment, x)
            norms = one_norm(y).clamp_min(self.noise * one_norm(moment)).clamp_min(_TINY)
            alpha = (lr / norms)[:, None, None]
            moment.copy_(y @ x)
            x.copy_(polar_step(cayley(x, y, alpha)))


def one_norm(stack: Tensor) -> Tensor:
    """‖·‖₁ of each matrix [k, n, n]: its largest column sum."""
    return stack.abs().sum(-2).amax(-1)


def skew(m: Tensor, x: Tensor) -> Tensor:
    """The skew-symmetric Y for which Y X is the part of M along the manifold at X."""
    product = m @ x.mT
    return (product - product.mT) / 2


def cayley(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """(I + α/2 Y)⁻¹ (I − α/2 Y) X: orthogonal where X is and Y is skew, and X − α Y X to first order."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    half = alpha / 2 * y
    solved: Tensor = torch.linalg.solve(identity + half, x - half @ x)
    return solved


def polar_step(x: Tensor) -> Tensor:
    """X (3 I − Xᵀ X) / 2, by which the distance to the next orthogonal matrix is squared."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return x @ (1.5 * identity - 0.5 * x.mT @ x)
