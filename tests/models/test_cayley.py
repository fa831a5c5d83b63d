"""Cayley steps: they stay on the manifold, go down, and are the exponential's to first order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rqc.compiler.rotate.run import NOISE
from rqc.models.cayley import CayleySGD, cayley, skew


def orthogonal(count: int, n: int, seed: int = 0) -> Tensor:
    draw = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, n, n)))
    return torch.linalg.qr(draw).Q.contiguous()


def off(x: Tensor) -> float:
    return float((x @ x.mT - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max())


@pytest.mark.parametrize(("count", "n"), [(1, 96), (30, 16), (3, 1), (2, 7)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_steps_stay_on_the_manifold(count: int, n: int, scale: float) -> None:
    x = orthogonal(count, n)
    descent = CayleySGD([x], [torch.zeros_like(x)], 0.9)
    generator = np.random.default_rng(1)
    for step in range(60):
        before = x.clone()
        descent.step([torch.from_numpy(scale * generator.standard_normal(x.shape))], 1 - step / 60)
        assert off(x) < 1e-12
        tangent = before.mT @ descent.moments[0]
        assert float((tangent + tangent.mT).abs().max()) <= 1e-12 * max(1.0, float(tangent.abs().max()))


@pytest.mark.parametrize("turning", [False, True])
def test_what_has_left_the_manifold_is_brought_back(turning: bool) -> None:
    """By each step, which squares the distance: a Cayley step alone would keep it."""
    x = orthogonal(2, 16)
    gradient, noise = (torch.from_numpy(np.random.default_rng(s).standard_normal(x.shape)) for s in (1, 2))
    x += 1e-6 * noise
    assert off(x) > 1e-6
    CayleySGD([x], [torch.zeros_like(x)], 0.9).step([turning * gradient], 0.5)
    assert off(x) < 1e-10


def test_a_gradient_off_the_manifold_moves_nothing() -> None:
    x = orthogonal(1, 24)
    before = x.clone()
    symmetric = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 24, 24)))
    CayleySGD([x], [torch.zeros_like(x)], 0.9).step([(symmetric + symmetric.mT) @ x], 1.0)
    torch.testing.assert_close(x, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_rounding_makes_of_a_gradient_off_the_manifold_moves_little(dtype: str) -> None:
    x = orthogonal(1, 96)
    before = x.clone()
    symmetric = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 96, 96)))
    of = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    gradient = ((symmetric + symmetric.mT).to(of) @ x.to(of)).double()
    CayleySGD([x], [torch.zeros_like(x)], 0.9, NOISE[dtype]).step([gradient], 0.25)
    assert float((x - before).norm() / x.norm()) < {"fp32": 1e-3, "bf16": 0.02}[dtype]
    assert not torch.equal(x, before)


def test_a_step_is_the_exponential_to_second_order() -> None:
    x = orthogonal(2, 12)
    y = skew(torch.from_numpy(np.random.default_rng(3).standard_normal(x.shape)), x)
    errors = []
    for alpha in (1e-2, 1e-3):
        exact = torch.matrix_exp(-alpha * y) @ x
        errors.append(float((cayley(x, y, torch.full((2, 1, 1), alpha).double()) - exact).abs().max()))
    assert errors[1] < errors[0] / 500


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_a_step_turns_as_far_as_it_is_told(scale: float, lr: float) -> None:
    """Whatever the scale of the gradients, and each matrix of a stack by itself."""
    x = orthogonal(3, 20)
    before = x.clone()
    gradient = torch.from_numpy(np.random.default_rng(4).standard_normal(x.shape))
    gradient *= scale * torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)[:, None, None]
    CayleySGD([x], [torch.zeros_like(x)], 0.9).step([gradient], lr)
    turn = before @ x.mT - x @ before.mT  # α Y to second order, both ways
    norms = (turn / 2).abs().sum(-2).amax(-1)
    torch.testing.assert_close(norms, torch.full_like(norms, lr), rtol=0.2, atol=0)


def test_descent_finds_a_rotation_that_is_known() -> None:
    """min ‖A X − B‖ for B = A X*, X* of X's component: the Procrustes problem, whose answer is X*."""
    target = orthogonal(1, 8, seed=5)
    x = orthogonal(1, 8, seed=6)
    if torch.linalg.det(x) * torch.linalg.det(target) < 0:
        x[0, 0] *= -1
    a = torch.from_numpy(np.random.default_rng(7).standard_normal((40, 8)))
    descent = CayleySGD([x], [torch.zeros_like(x)], 0.5)
    for step in range(400):
        descent.step([2 * a.mT @ (a @ x - a @ target) / 40], 0.3 * (1 - step / 400))
    torch.testing.assert_close(x, target, rtol=0, atol=1e-4)
