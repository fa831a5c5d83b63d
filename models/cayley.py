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
    X ← (I + α/2 Y)⁻¹ (I − α/2 Y) X with α = min(lr, 1 / ‖Y‖₁), so that no step turns far. The Cayley transform of a
    skew matrix is orthogonal; what rounding leaves, Newton's step to the next orthogonal matrix takes away.
    """

    def __init__(self, matrices: Sequence[Tensor], moments: Sequence[Tensor], momentum: float) -> None:
        """Take over float64 stacks and their momenta M (0 at the start), which are changed in place."""
        self.matrices, self.moments, self.momentum = matrices, moments, momentum

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step down the gradients dL/dX, float64 [k, n, n]."""
        for x, moment, gradient in zip(self.matrices, self.moments, gradients, strict=True):
            moment.mul_(self.momentum).add_(gradient)
            y = skew(moment, x)
            moment.copy_(y @ x)
            norms = y.abs().sum(-2).amax(-1)
            alpha = (1 / norms.clamp_min(_TINY)).clamp_max(lr)[:, None, None]
            x.copy_(polar_step(cayley(x, y, alpha)))


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
