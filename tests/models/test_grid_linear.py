"""The linear layer on packed codes against nn.Linear on the dequantized weight, alone and under peft."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.grid_linear import GridLinear
from rqc.models.nf4 import LevelQuantized, NormalFloat, quantize_levels
from rqc.runtime.errors import CheckpointError, SchemeError

GRIDS = [
    Grid(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 6, 8), (32, -1), (True, False))
]
ALL_GRIDS: list[Grid | NormalFloat] = [*GRIDS, Grid(2, 16, False, "mse"), Grid(4, 128), NormalFloat(), NormalFloat(2)]
SHAPES = [(96, 128), (40, 152), (7, 33)]
"""[N, K]; the last two end in a block that K does not fill."""


def value(n: int, k: int, grid: Grid | NormalFloat, seed: int = 0) -> Quantized | LevelQuantized:
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    w[0] = 0  # scales of 0
    return quantize_levels(w, grid) if isinstance(grid, NormalFloat) else quantize(w, grid)


def dense(quantized: Quantized | LevelQuantized, bias: Tensor | None = None) -> nn.Linear:
    n, k = quantized.shape
    linear = nn.Linear(k, n, bias=bias is not None)
    linear.weight = nn.Parameter(torch.from_numpy(quantized.dequantize()), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


def same(left: Any, right: Any) -> bool:
    """Whether two quantized values agree to the last bit."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in vars(left)]
    return type(left) is type(right) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs
    )


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_and_value_are_those_of_the_quantized_weight(shape: tuple[int, int], grid: Grid | NormalFloat) -> None:
    quantized = value(*shape, grid)
    layer = GridLinear.from_quantized(quantized)
    assert layer.weight.numpy().tobytes() == quantized.dequantize().tobytes()
    assert same(layer.quantized(), quantized)


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_forward_and_gradient_equal_a_dense_layer(grid: Grid | NormalFloat) -> None:
    torch.manual_seed(0)
    bias = torch.randn(40)
    quantized = value(40, 152, grid)
    layer, plain = GridLinear.from_quantized(quantized, bias), dense(quantized, bias)
    inputs = [torch.randn(2, 5, 152, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    ours, theirs = layer.double()(inputs[0]), plain.double()(inputs[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    pull = torch.randn_like(ours)
    ours.backward(pull)
    theirs.backward(pull)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-13, atol=1e-13)


def test_rows_in_many_slabs_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = GridLinear.from_quantized(value(40, 152, Grid(3, 32, False)))
    x = torch.randn(3, 152, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    whole = layer.weight
    monkeypatch.setattr("rqc.models.grid_linear._SLAB", {"cpu": 152 * 7})
    again = layer(x)
    torch.testing.assert_close(again, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), x)[0], gradient, rtol=1e-13, atol=1e-12)
    assert torch.equal(layer.weight, whole)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_of_the_model_damage_nothing(cast: torch.dtype) -> None:
    for grid in (Grid(2, 32, False), NormalFloat()):
        quantized = value(40, 152, grid)
        layer = GridLinear.from_quantized(quantized, torch.randn(40))
        model = nn.Sequential(layer).to(cast)
        assert layer.bias.dtype == cast
        x = torch.randn(3, 152).to(cast)
        assert model(x).dtype == cast
        assert same(model.to(torch.float32)[0].quantized(), quantized)


def test_low_precision_computes_on_the_cast_weight() -> None:
    quantized = value(40, 152, Grid(4, 32))
    x = torch.randn(3, 152, dtype=torch.bfloat16)
    expected = dense(quantized).to(torch.bfloat16)(x)
    torch.testing.assert_close(GridLinear.from_quantized(quantized)(x), expected)


def test_autocast_rounds_inputs_and_returns_gradients_in_float32() -> None:
    quantized = value(40, 152, Grid(4, 32))
    layer, plain = GridLinear.from_quantized(quantized, torch.ones(40)), dense(quantized, torch.ones(40))
    x = torch.randn(3, 152, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(x), plain(z)
        assert layer(x.double()).dtype == plain.double()(z.double()).dtype == torch.float64
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, z.grad, rtol=2e-2, atol=2e-1)


def test_state_travels_by_state_dict_copy_and_pickle() -> None:
    layer = GridLinear.from_quantized(value(40, 152, Grid(4, 32, False)), torch.randn(40))
    other = GridLinear.from_quantized(value(40, 152, Grid(4, 32, False), seed=1), torch.randn(40))
    assert not torch.equal(other.weight, layer.weight)
    assert not other.load_state_dict(layer.state_dict()).missing_keys
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)
    twin = copy.deepcopy(layer)
    assert same(twin.quantized(), layer.quantized())
    assert twin.codes.data_ptr() != layer.codes.data_ptr()
    assert layer.to("meta").weight.shape == (40, 152)
    assert layer(torch.empty(2, 3, 152, device="meta")).shape == (2, 3, 40)


def test_nothing_dense_outlives_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    packed = GridLinear.from_quantized(value(40, 152, Grid(4, 32)))
    rows = type(packed._packed()).rows

    def watched(self: Any, *args: Any) -> Tensor:
        slab = rows(self, *args)
        made.append(weakref.ref(slab))
        return slab

    monkeypatch.setattr(type(packed._packed()), "rows", watched)
    saved: list[Tensor] = []
    x = torch.randn(3, 152, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = packed(x)
    assert made
    assert all(slab() is None for slab in made)
    assert not saved
    before = len(made)
    y.sum().backward()
    assert len(made) == 2 * before, "the backward pass dequantizes again"
    assert all(slab() is None for slab in made)


def test_only_what_needs_a_gradient_gets_one() -> None:
    layer = GridLinear.from_quantized(value(40, 152, Grid(4, 32)), torch.randn(40))
    assert not [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert not layer(torch.randn(3, 152)).requires_grad
    layer.bias.requires_grad_()
    x = torch.randn(2, 3, 152)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 6.0))


def test_gradient_checkpointing_changes_nothing() -> None:
    layer = GridLinear.from_quantized(value(40, 152, Grid(2, 32, False)))
    x = torch.randn(3, 152, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    for reentrant in (True, False):
        y: Any = checkpoint(layer, x, use_reentrant=reentrant)
        x.grad = None
        y.square().sum().backward()
        assert torch.equal(x.grad, expected)


def test_from_linear_rounds_as_the_compiler_does() -> None:
    linear = nn.Linear(152, 40)
    grid = Grid(3, 32, False, "mse")
    layer = GridLinear.from_linear(linear, grid)
    assert same(layer.quantized(), quantize(linear.weight.detach().numpy(), grid))
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias
    assert "3" in repr(layer)
    assert "asymmetric" in repr(layer)


def test_stored_bytes_are_those_of_the_engine() -> None:
    quantized = quantize(np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32), Grid(2, 32, False))
    layer = GridLinear.from_quantized(quantized)
    expected = quantized.packed_codes().nbytes + quantized.scales.nbytes + quantized.packed_zero_points().nbytes
    assert layer.stored_bytes == expected
    assert layer.codes.nbytes == 64 * 128 // 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", [Grid(2, 32, False), Grid(4, -1), NormalFloat(), NormalFloat(2)], ids=str)
def test_another_device_has_the_same_weight_to_the_last_bit(grid: Grid | NormalFloat) -> None:
    quantized = value(40, 152, grid)
    layer = GridLinear.from_quantized(quantized, torch.randn(40)).cuda()
    assert layer.weight.cpu().numpy().tobytes() == quantized.dequantize().tobytes()
    assert same(layer.quantized(), quantized)
    x = torch.randn(3, 152, dtype=torch.float64, device="cuda", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    w = layer.weight.as_subclass(Tensor).double()
    torch.testing.assert_close(y, x @ w.T + layer.bias)
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, -1))


class Model(nn.Module):
    """Two layers that peft can wrap."""

    def __init__(self, grid: Grid | NormalFloat | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(96, 152)
        self.down = nn.Linear(152, 96, bias=False)
        if grid is not None:
            self.up = GridLinear.from_linear(self.up, grid)
            self.down = GridLinear.from_linear(self.down, grid)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(2, -1), NormalFloat()], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_trains_under_peft_as_a_dense_layer_would(grid: Grid | NormalFloat, dora: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], use_dora=dora)
    ours = Model(grid)
    theirs = Model(None)
    for name in ("up", "down"):
        getattr(theirs, name).weight.data = getattr(ours, name).weight.clone().as_subclass(Tensor)
        getattr(theirs, name).requires_grad_(False)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        x = torch.randn(8, 96)
        steps = []
        for _ in range(5):
            loss = (wrapped(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_the_codes_is_refused_rather_than_lost(safe: bool) -> None:
    model = peft.get_peft_model(Model(Grid(4, 32)), peft.LoraConfig(r=4, target_modules=["up"]))
    with pytest.raises(SchemeError, match="codes are fixed"):
        model.merge_and_unload(safe_merge=safe)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    linear = nn.Linear(64, 8)
    linear.weight.data[3, 5] = float("nan")
    for grid in (Grid(4, 32), NormalFloat()):
        with pytest.raises(CheckpointError, match="not finite"):
            GridLinear.from_linear(linear, grid)


PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""QLoRA, appendix E."""


def test_levels_are_the_published_ones() -> None:
    np.testing.assert_allclose(NormalFloat().levels, PUBLISHED_NF4, atol=2e-7)
    np.testing.assert_allclose(NormalFloat(2).levels, [-1, 0, 0.3379, 1], atol=5e-5)


def test_levels_round_to_the_nearest() -> None:
    w = np.random.default_rng(0).standard_normal((9, 150)).astype(np.float32)
    for grid in (NormalFloat(), NormalFloat(2), NormalFloat(4, 16)):
        quantized = quantize_levels(w, grid)
        for row in range(len(w)):
            for start in range(0, 150, grid.block_size):
                block = w[row, start : start + grid.block_size].astype(np.float64)
                largest = np.abs(block).max()
                distance = np.abs(block[:, None] - largest * grid.levels[None])
                chosen = quantized.codes[row, start : start + grid.block_size]
                taken = np.take_along_axis(distance, chosen[:, None].astype(int), 1)[:, 0]
                assert (taken <= distance.min(1) + 1e-6).all()
        assert same(quantize_levels(quantized.dequantize(), grid), quantized), "values on the grid stay"


@pytest.mark.parametrize(("bits", "block"), [(3, 64), (8, 64), (4, 24), (4, 0)])
def test_normal_float_refuses_what_it_cannot_pack(bits: int, block: int) -> None:
    with pytest.raises(SchemeError):
        NormalFloat(bits, block)
