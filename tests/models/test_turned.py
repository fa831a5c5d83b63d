"""Gradients through roundings in a rotated basis: against differences, against the folded model, and down to a loss."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny import TinyModel
from torch import Tensor

from rqc.models import straight_through
from rqc.models.fake_quant import GraphGrid, quantize_inputs
from rqc.models.grid import Grid, quantize
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.straight_through import round_tokens, round_weight
from rqc.models.token_grid import TokenGrid
from rqc.models.turned import Basis, Rounding, Roundings, turn_linears

SITES = Rotation.parse("r1,r2,r3,r4")
FOUR = TokenGrid(4)
IDS = np.random.default_rng(0).integers(3, 90, 24)
FAMILIES = ("llama-tied", "llama-bias", "phi3", "gemma", "qwen3-moe")


def turned(
    model: object,
    rounding: Rounding,
    *,
    weights: Grid | None = None,
    cache: Rounding | None = None,
    centred: bool = False,
) -> tuple[Reference, Basis]:
    """A tiny model whose linears round in the basis of all sites, and that basis, in float64."""
    reference = Reference.load(model)  # type: ignore[arg-type]
    reference.fold_norms(tied=reference.description.architecture.tied)
    reference.model.double()
    basis = Basis(SITES, reference.description, torch.float64)
    inputs = {claim.weight: rounding for claim in reference.description.claims if claim.quantized}
    turn_linears(reference, basis, Roundings(inputs, weights, cache, centred))
    return reference, basis


def logits(reference: Reference) -> Tensor:
    found: Tensor = reference.model(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_in_floats_no_rotation_changes_the_function(tiny_model: TinyModel, name: str) -> None:
    plain = Reference.load(tiny_model(name))
    plain.model.double()
    reference, _ = turned(tiny_model(name), lambda x: x, cache=lambda x: x)
    with torch.no_grad():
        torch.testing.assert_close(logits(reference), logits(plain), rtol=1e-6, atol=1e-6)  # the norms' gains: float32


@pytest.mark.parametrize("weights", [None, Grid(4, 32)], ids=["float", "rtn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_folded_model_with_rounded_inputs(tiny_model: TinyModel, name: str, weights: Grid | None) -> None:
    """What an engine computes: folded, rotated online, rounded. One seed of rounding's chaos: the first block alone."""
    path = tiny_model(name)
    folded = Reference.load(path)
    tied = folded.description.architecture.tied
    folded.fold(SITES, tied=tied)
    names = [claim.weight for claim in folded.description.claims if claim.quantized]
    if weights is not None:
        for each in names:
            folded.set_weight(each, quantize(folded.read(each), weights).dequantize())
    folded.rotate_online(SITES, tied=tied)
    quantize_inputs(folded, {each: GraphGrid(FOUR) for each in names})
    reference = Reference.load(path)
    reference.fold_norms(tied=tied)
    inputs = dict.fromkeys(names, partial(round_tokens, grid=FOUR))
    turn_linears(reference, Basis(SITES, reference.description), Roundings(inputs, weights))
    with torch.no_grad():
        found, wanted = logits(reference), logits(folded)
        plain = logits(Reference.load(path))
    error, rounding = (found - wanted).norm(), (wanted - plain).norm()
    assert error < 0.35 * rounding  # a code on the other side of a tie moves others behind it


def test_centred_keys_are_rounded_without_their_mean(tiny_model: TinyModel) -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    reference, _ = turned(tiny_model("llama-bias"), lambda x: x, cache=keep, centred=True)
    plain = Reference.load(tiny_model("llama-bias"))
    plain.model.double()
    with torch.no_grad():
        torch.testing.assert_close(logits(reference), logits(plain), rtol=1e-6, atol=1e-6)
    keys, values = kept[::2], kept[1::2]
    assert all(float(k.mean((0, 2)).abs().max()) < 1e-6 for k in keys)
    assert all(float(v.mean((0, 2)).abs().max()) > 1e-3 for v in values)


@pytest.mark.parametrize("weights", [None, Grid(4, 32)], ids=["float", "rtn"])
def test_it_can_leave_rounding_out(tiny_model: TinyModel, weights: Grid | None) -> None:
    """What the rounded model is compared with costs no second one."""
    rounding = partial(round_tokens, grid=FOUR)
    reference, basis = turned(tiny_model("llama-bias"), rounding, weights=weights, cache=rounding)
    plain = Reference.load(tiny_model("llama-bias"))
    plain.model.double()
    with torch.no_grad(), basis.in_floats():
        torch.testing.assert_close(logits(reference), logits(plain), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert (logits(reference) - logits(plain)).norm() > 1e-3 * logits(plain).norm()


@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_gradients_are_differences_with_frozen_errors(tiny_model: TinyModel, name: str) -> None:
    """A straight-through gradient is the derivative of x + e with the rounding error e held fast. transformers computes
    norms in float32: so wide a difference."""
    errors: list[Tensor] = []
    replay = iter(())

    def record(x: Tensor) -> Tensor:
        errors.append((round_tokens(x.float(), FOUR).double() - x).detach())
        return x + errors[-1]

    def repeat(x: Tensor) -> Tensor:
        return x + next(replay)

    rounding = [record]
    reference, basis = turned(tiny_model(name), lambda x: rounding[0](x), cache=lambda x: rounding[0](x))

    def loss() -> Tensor:
        found = logits(reference)
        return torch.nn.functional.cross_entropy(found[:-1], torch.from_numpy(IDS[1:]))

    parameters = list(basis.learned.values())
    gradients = torch.autograd.grad(loss(), parameters)
    rounding[0] = repeat
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.from_numpy(np.random.default_rng(1).standard_normal(parameter.shape))
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter += step * direction
                replay = iter(errors)
                values.append(float(loss()))
                parameter -= step * direction
        assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)


@pytest.mark.parametrize(
    "grid", [FOUR, TokenGrid(4, False), TokenGrid(6, True, 0.8), TokenGrid(4, False, 0.9)], ids=str
)
def test_tokens_are_rounded_as_in_the_graph(grid: TokenGrid) -> None:
    x = np.random.default_rng(0).standard_normal((50, 77)).astype(np.float32)
    x[3] = 0
    np.testing.assert_allclose(round_tokens(torch.from_numpy(x), grid).numpy(), grid.round(x), atol=1e-6)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1), Grid(2, 64, False), Grid(8, 16, False)], ids=str)
def test_weights_are_rounded_as_in_the_engine(grid: Grid) -> None:
    w = np.random.default_rng(0).standard_normal((40, 152)).astype(np.float32)
    w[5] = 0
    wanted = quantize(w, grid).dequantize()
    found = round_weight(torch.from_numpy(w), grid).numpy()
    assert (np.abs(found - wanted) > 1e-5).mean() < 1e-3  # ties


GRADIENTS = {
    **{str(grid): partial(round_tokens, grid=grid) for grid in (FOUR, TokenGrid(4, False), TokenGrid(4, False, 0.8))},
    **{f"weight {grid}": partial(round_weight, grid=grid) for grid in (Grid(4, 32), Grid(3, -1), Grid(2, 16, False))},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_reach_scales_and_the_ends_of_ranges(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are derivatives with what rounding adds to each code held fast, but where a code is at the end of its range,
    beyond which that moves nothing."""
    draw, rounding = np.random.default_rng(0), GRADIENTS[name]
    x, along, weights = (torch.from_numpy(draw.standard_normal((6, 72)).astype(np.float32)) for _ in range(3))
    added: list[Tensor] = []
    nearest = straight_through._nearest

    def recorded(value: Tensor) -> Tensor:
        added.append((torch.round(value) - value).detach())
        return nearest(value)

    def moved(step: float) -> Tensor:
        replay = iter(added)
        monkeypatch.setattr(straight_through, "_nearest", lambda value: value + next(replay))
        return rounding(x.detach() + step * along).detach()

    monkeypatch.setattr(straight_through, "_nearest", recorded)
    rounded = rounding(x.requires_grad_())
    forth, here, back = (moved(step) for step in (1e-2, 0, -1e-2))
    weights *= (forth - 2 * here + back).abs() < 1e-4
    (gradient,) = torch.autograd.grad((rounded * weights).sum(), x)
    assert (weights != 0).float().mean() > 0.7
    slope = float(((forth - back) * weights).sum()) / 2e-2
    assert float((gradient * along).sum()) == pytest.approx(slope, abs=1e-2)
    assert abs(float((along * weights).sum()) - slope) > 0.1, "that of the identity"
