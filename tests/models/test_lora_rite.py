"""LoRA-RITE sees the product of a pair alone, whatever its factors; and goes on from what it has saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rqc.models.lora_rite import LoraRite
from rqc.runtime.errors import SchemeError

Make = Callable[[list[tuple[nn.Parameter, nn.Parameter]]], torch.optim.Optimizer]
OUT, IN, RANK = 20, 28, 4
BATCH = 64
TARGET = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rite(**options: Any) -> Make:
    return lambda pairs: LoraRite(pairs, **{"lr": 1e-2, **options})


def adamw(**options: Any) -> Make:
    return lambda pairs: torch.optim.AdamW(
        [each for pair in pairs for each in pair], **{"lr": 1e-2, "weight_decay": 0.0, **options}
    )


def factors(seed: int, *, zero: bool, dtype: torch.dtype = torch.float64, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN, generator=generator, dtype=torch.float64) / IN**0.5
    b = torch.randn(OUT, rank, generator=generator, dtype=torch.float64) / 10
    return a.to(dtype), (torch.zeros_like(b) if zero else b).to(dtype)


def trained(make: Make, starts: list[tuple[Tensor, Tensor]], steps: int = 12, target: Tensor = TARGET) -> list[Tensor]:
    """The products of all pairs after every step on noisy least squares."""
    pairs = [(nn.Parameter(a.clone()), nn.Parameter(b.clone())) for a, b in starts]
    optimizer = make(pairs)
    generator = torch.Generator().manual_seed(2)
    products = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = torch.zeros((), dtype=starts[0][0].dtype)
        for a, b in pairs:
            x = torch.randn(BATCH, IN, generator=generator, dtype=torch.float64).to(a)
            loss = loss + (x @ a.T @ b.T - x @ target.to(a).T).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        products.append(torch.stack([(b @ a).detach().double() for a, b in pairs]))
    return products


def transformed(start: tuple[Tensor, Tensor], seed: int, condition: float) -> tuple[Tensor, Tensor]:
    """T A and B T⁻¹ for a T of that condition, computed in float64."""
    a, b = start
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(len(a), len(a), generator=generator).double())[0] for _ in range(2))
    sizes = torch.logspace(0, 1, len(a), base=condition, dtype=torch.float64)
    t = left @ torch.diag(sizes) @ right
    return (t @ a.double()).to(a), (b.double() @ torch.linalg.inv(t)).to(b)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of the changes since the first step's product."""
    return max(float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"max_grad_norm": 0.05}, {"betas": (0.8, 0.9)}], ids=str
)
def test_the_product_moves_alike_whatever_its_factors(zero: bool, options: dict[str, Any]) -> None:
    starts = [factors(seed, zero=zero) for seed in range(3)]
    plain = trained(rite(**options), starts)
    for condition in (1.0, 1e3):
        moved = [transformed(start, seed, condition) for seed, start in enumerate(starts)]
        assert distance(trained(rite(**options), moved), plain) < 1e-7
    assert float((plain[-1] - plain[0]).norm()) > 0.1


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_in_float32_too(scale: float) -> None:
    start = factors(0, zero=True, dtype=torch.float32)
    plain = trained(rite(), [start])
    moved = [(start[0] * scale, start[1] / scale), transformed(start, 1, 30.0)]
    for other in moved:
        assert distance(trained(rite(), [other]), plain) < 1e-3


def test_adamw_does_not() -> None:
    start = factors(0, zero=True)
    assert distance(trained(adamw(), [transformed(start, 1, 10.0)]), trained(adamw(), [start])) > 0.3
    unclipped = trained(rite(), [start])
    assert distance(trained(rite(max_grad_norm=0.05), [start]), unclipped) > 1e-3  # the cut above did cut


def polar(y: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ vh, vh.T @ torch.diag(s) @ vh


class Paper:
    """One factor's part of the paper's algorithm as it is written there, with Adam's means, in float64."""

    def __init__(self, rows: int) -> None:
        self.m, self.v, self.rho = torch.zeros(rows, RANK).double(), torch.zeros(RANK, RANK).double(), 0.0
        self.u: Tensor | None = None

    def move(self, gradient: Tensor, y: Tensor, step: int, lr: float) -> Tensor:
        u, magnitude = polar(y)
        unmagnified = gradient @ torch.linalg.inv(magnitude)
        p = torch.eye(RANK).double() if self.u is None else u.T @ self.u
        carried = p @ self.v @ p.T
        escaped = (torch.linalg.eigvalsh(self.v) - torch.linalg.eigvalsh(carried)).abs().max()
        self.rho = 0.999 * (self.rho + float(escaped))
        self.v = 0.999 * carried + 0.001 * unmagnified.T @ unmagnified / len(gradient)
        values, vectors = torch.linalg.eigh((self.v + self.rho * torch.eye(RANK)) / (1 - 0.999**step))
        s = unmagnified @ vectors @ torch.diag(values**-0.5) @ vectors.T
        self.m = 0.9 * self.m @ p.T + 0.1 * s
        self.u = u
        move: Tensor = -lr * self.m / (1 - 0.9**step) @ torch.linalg.inv(magnitude).T
        return move


def test_it_is_the_papers_algorithm() -> None:
    a, b = factors(0, zero=False)
    pair = (nn.Parameter(a.clone()), nn.Parameter(b.clone()))
    optimizer = LoraRite([pair], lr=3e-2)
    papers = (Paper(IN), Paper(OUT))
    for step in range(1, 8):
        w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        pair[0].grad, pair[1].grad = pair[1].detach().T @ w, w @ pair[0].detach().T
        optimizer.step()
        moves = papers[0].move(w.T @ b, b, step, 3e-2), papers[1].move(w @ a.T, a.T, step, 3e-2)
        a, b = a + moves[0].T, b + moves[1]
        assert papers[0].rho > 0 or step == 1
        assert float((pair[0].detach() - a).norm() / a.norm()) < 1e-4
        assert float((pair[1].detach() - b).norm() / b.norm()) < 1e-4


def test_a_zero_factor_holds_the_other_where_it_stands_and_moves_itself() -> None:
    a, b = factors(0, zero=True, dtype=torch.float32)
    pair = (nn.Parameter(a.clone()), nn.Parameter(b.clone()))
    optimizer = LoraRite([pair], lr=1e-3)
    pair[0].grad, pair[1].grad = torch.zeros_like(a), torch.randn_like(b)
    optimizer.step()
    assert torch.equal(pair[0], a)
    assert torch.linalg.matrix_rank(pair[1].detach()) == RANK
    move = pair[1].detach() @ a
    assert float(move.norm()) == pytest.approx(1e-3 * (OUT * RANK) ** 0.5, rel=1e-3)  # entries as large as Adam's


@pytest.mark.parametrize("case", ["no gradient", "rank one", "vanishing", "wide", "tiny b"])
def test_degenerate_pairs_stay_finite(case: str) -> None:
    a, b = factors(0, zero=case != "tiny b", dtype=torch.float32, rank=24 if case == "wide" else RANK)
    pair = (nn.Parameter(a), nn.Parameter(b * 1e-20))
    optimizer = LoraRite([pair], lr=1e-2)
    for step in range(6):
        w = torch.randn(OUT, IN) if case != "rank one" else torch.outer(torch.ones(OUT), torch.ones(IN))
        w = w * (1e-25 if case == "vanishing" else 0.0 if case == "no gradient" or step == 3 else 1.0)
        pair[0].grad, pair[1].grad = pair[1].detach().T @ w, w @ pair[0].detach().T
        before = (pair[1] @ pair[0]).detach()
        optimizer.step()
        move = (pair[1] @ pair[0]).detach() - before
        assert torch.isfinite(pair[0]).all()
        assert torch.isfinite(pair[1]).all()
        assert float(move.norm()) < 1e-2 * 3 * 2 * (OUT**0.5 + IN**0.5) * RANK
        if case in ("no gradient", "vanishing"):
            assert float(move.norm()) < 1e-8


def test_it_learns_no_worse_than_adamw_and_better_from_unequal_factors() -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(OUT, 3, generator=generator), torch.randn(3, IN, generator=generator)
    target = (left @ right / 8).double()
    rates = (1e-2, 1e-1)

    def best(make: Callable[..., Make], start: tuple[Tensor, Tensor]) -> float:
        runs = (trained(make(lr=rate), [start], 80, target)[-1][0] for rate in rates)
        return min(float((found - target).norm() / target.norm()) for found in runs)

    even = factors(3, zero=True, dtype=torch.float32)
    uneven = (even[0] * 100, even[1] / 100)
    assert best(rite, even) < max(1.05 * best(adamw, even), 1e-3)
    assert best(rite, uneven) < 0.5 * best(adamw, uneven)


def test_what_is_no_pair_is_stepped_as_adamw_does() -> None:
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizers = [LoraRite([], [mine], **options), torch.optim.AdamW([theirs], **options)]
    for _ in range(5):
        for parameter, optimizer in zip((mine, theirs), optimizers, strict=True):
            parameter.grad = parameter.detach() ** 2 - 1
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=1e-7)


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    def made() -> tuple[list[tuple[nn.Parameter, nn.Parameter]], nn.Parameter, LoraRite]:
        starts = [factors(seed, zero=True, dtype=torch.float32) for seed in range(2)]
        pairs = [(nn.Parameter(a), nn.Parameter(b)) for a, b in starts]
        magnitude = nn.Parameter(torch.ones(OUT))
        return pairs, magnitude, LoraRite(pairs, [magnitude], lr=1e-2, max_grad_norm=1.0)

    def steps(pairs: Any, magnitude: nn.Parameter, optimizer: LoraRite, numbers: range) -> None:
        for number in numbers:
            w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(number))
            for a, b in pairs:
                a.grad, b.grad = b.detach().T @ w, w @ a.detach().T
            magnitude.grad = w.sum(1)
            optimizer.step()

    whole, begun = made(), made()
    steps(*whole, range(8))
    steps(*begun, range(5))
    buffer = io.BytesIO()
    torch.save(begun[2].state_dict(), buffer)
    buffer.seek(0)
    pairs, magnitude, optimizer = made()
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for (a, b), (old_a, old_b) in zip(pairs, begun[0], strict=True):
            a.copy_(old_a)
            b.copy_(old_b)
        magnitude.copy_(begun[1])
    fresh = copy.deepcopy(pairs)
    steps(pairs, magnitude, optimizer, range(5, 8))
    for (a, b), (whole_a, whole_b) in zip(pairs, whole[0], strict=True):
        assert torch.equal(a, whole_a)
        assert torch.equal(b, whole_b)
    assert torch.equal(magnitude, whole[1])
    steps(fresh, nn.Parameter(magnitude.detach().clone()), LoraRite(fresh, lr=1e-2, max_grad_norm=1.0), range(5, 8))
    assert not torch.equal(fresh[0][0], pairs[0][0])  # without its memory it goes elsewhere


def test_factors_of_different_ranks_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"A \[4, 28\] and B \[20, 5\]"):
        LoraRite([(nn.Parameter(torch.zeros(4, 28)), nn.Parameter(torch.zeros(20, 5)))])
