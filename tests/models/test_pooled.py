"""Pooling adapters under peft: what they compute, that they train, and that peft saves and loads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from rqc.models.delta import Delta
from rqc.models.grid import Grid
from rqc.models.grid_linear import GridLinear
from rqc.models.pooled import BlockSums, PooledIn, RepeatOut, attach, delta_of, set_factors
from rqc.runtime.errors import SchemeError

SMOLLM2 = {
    "q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576),
    "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576),
}  # fmt: skip
"""[in, out] of the linears of a layer."""

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lora", {}, {}),
    ("lora", {}, {"use_rslora": True}),
    ("lora", {}, {"use_dora": True}),
    ("qalora", {"pool": 16}, {}),
    ("qalora", {"pool": 16}, {"use_dora": True}),
    ("qalora", {"pool": 32, "repeat": 4}, {"use_rslora": True}),
    ("qahira", {"pool": 16}, {}),
    ("qahira", {"pool": 32, "repeat": 8}, {}),
    ("qahira", {"pool": 16}, {"use_dora": True}),
    ("qbara", {"pool": 2}, {}),
    ("qbara", {"pool": 4}, {"use_dora": True}),
]
IDS = [" ".join(map(str, (kind, *sizes.values(), *options))) for kind, sizes, options in CASES]


class Model(nn.Module):
    """up [88 -> 120] with a bias, down [120 -> 88]: 88 and 120 end in partial blocks of 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(88, 120), nn.Linear(120, 88, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def adapted(kind: str, sizes: dict[str, Any], options: dict[str, Any], base: nn.Module | None = None) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], **options)
    model = peft.get_peft_model(base or Model(), config)
    if kind != "lora":
        attach(model, kind, **sizes)
    return model


def stir(model: nn.Module) -> None:
    """Give every trainable parameter another value."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@pytest.mark.parametrize(("kind", "sizes", "options"), CASES, ids=IDS)
def test_the_module_computes_the_update_it_reports(kind: str, sizes: Any, options: Any) -> None:
    model = adapted(kind, sizes, options)
    stir(model)
    for layer in layers(model.double()).values():
        delta = delta_of(layer)
        assert delta.a.dtype == delta.b.dtype == np.float64
        assert (delta.magnitude is not None) == bool(options.get("use_dora"))
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        w = delta.merged(layer.base_layer.weight.detach().numpy())
        expected = x @ torch.from_numpy(w).T + (0 if layer.base_layer.bias is None else layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        if kind in ("qalora", "qahira"):
            assert delta.pooled(sizes["pool"]) is not None


@pytest.mark.parametrize(("kind", "sizes", "options"), CASES, ids=IDS)
def test_attached_adapters_start_at_nothing_and_learn(kind: str, sizes: Any, options: Any) -> None:
    model = adapted(kind, sizes, options)
    x = torch.randn(4, 88)
    torch.testing.assert_close(model(x), Model()(x), rtol=1e-5, atol=1e-6)
    target = torch.randn(4, 88)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("kind", "sizes", "options"), CASES, ids=IDS)
def test_peft_saves_and_loads_checkpoints(kind: str, sizes: Any, options: Any, tmp_path: Path) -> None:
    model = adapted(kind, sizes, options)
    stir(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    resumed = adapted(kind, sizes, options)
    resumed.load_adapter(str(tmp_path / "checkpoint-1"), "default", is_trainable=True)
    x = torch.randn(2, 88)
    assert torch.equal(resumed(x), model(x))
    again = adapted(kind, sizes, options)
    state = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    assert not peft.set_peft_model_state_dict(again, state).unexpected_keys
    assert torch.equal(again(x), model(x))
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        torch.testing.assert_close(model(x), Model()(x))
    assert torch.equal(resumed(x), model(x))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", ["qalora", "qahira"])
def test_offsets_act_on_sums_of_inputs_as_in_the_equations(kind: str) -> None:
    """D = c B A for QA-LoRA and D = C for QA-HiRA, one value for each output and block of inputs."""
    model = adapted(kind, {"pool": 16}, {})
    stir(model)
    layer = layers(model)["base_model.model.up"]
    first, second = layer.lora_A["default"], layer.lora_B["default"]
    x = torch.randn(3, 88)
    sums = torch.stack([x[:, start : start + 16].sum(1) for start in range(0, 88, 16)], dim=1)
    offsets = second.weight if kind == "qahira" else 6 / 4 * second.weight @ first.weight
    torch.testing.assert_close(layer(x) - layer.base_layer(x), sums @ offsets.T, rtol=1e-4, atol=1e-5)
    factors = delta_of(layer)
    compact = factors.pooled(16)
    assert compact is not None
    np.testing.assert_allclose(
        factors.scale * factors.b @ compact, offsets.detach().double().numpy(), rtol=1e-5, atol=1e-6
    )


def test_hira_without_repetition_is_trainable_zero_points() -> None:
    """y = x (s (q - z))ᵀ with z a parameter has gradient and step -s·dD; D = -s (z' - z) gives the same function."""
    grid, g = Grid(4, 16, False), 16
    torch.manual_seed(0)
    linear = nn.Linear(96, 24, bias=False)
    base = GridLinear.from_linear(linear, grid)
    quantized: Any = base.quantized()
    whole = nn.ModuleDict({"norm": nn.LayerNorm(96), "up": base})
    model = peft.get_peft_model(whole, peft.LoraConfig(r=1, target_modules=["up"]))
    attach(model, "qahira", pool=g)
    layer = layers(model)["base_model.model.up"].double()
    offsets = layer.lora_B["default"].weight
    assert offsets.numel() == quantized.zero_points.size
    codes = torch.from_numpy(quantized.codes).double().reshape(24, 6, g)
    scales = torch.from_numpy(quantized.scales).double()
    zero_points = torch.from_numpy(quantized.zero_points).double().requires_grad_()

    def with_zero_points(x: Tensor) -> Tensor:
        return x @ ((codes - zero_points[..., None]) * scales[..., None]).flatten(1).T

    x, pull = torch.randn(5, 96, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), with_zero_points(x), rtol=1e-6, atol=1e-6)  # its base is float32
    layer(x).backward(pull)
    with_zero_points(x).backward(pull)
    torch.testing.assert_close(zero_points.grad, -scales * offsets.grad, rtol=1e-12, atol=1e-12)
    step = torch.randn(24, 6, dtype=torch.float64)
    zero_points.data += step
    offsets.data -= scales * step
    torch.testing.assert_close(layer(x), with_zero_points(x), rtol=1e-6, atol=1e-6)  # its base is float32


class SmolLayer(nn.Module):
    """The linears of one layer of SmolLM2-135M."""

    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SMOLLM2.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))


def trainable(kind: str, rank: int, **sizes: int) -> int:
    model = peft.get_peft_model(SmolLayer(), peft.LoraConfig(r=rank, target_modules=list(SMOLLM2)))
    if kind != "lora":
        attach(model, kind, **sizes)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_parameters_are_those_of_the_formulas(rank: int) -> None:
    shapes = SMOLLM2.values()
    lora = sum(rank * (i + o) for i, o in shapes)
    assert trainable("lora", rank) == lora
    assert trainable("qbara", rank, pool=2) == lora, "to the digit"
    assert trainable("qbara", rank, pool=4) == lora
    assert trainable("qalora", rank, pool=32) == sum(rank * (i // 32 + o) for i, o in shapes)
    assert trainable("qalora", rank, pool=32, repeat=4) == sum(rank * (i // 32 + o // 4) for i, o in shapes)
    assert trainable("qahira", rank, pool=32, repeat=2) == sum(i // 32 * (o // 2) for i, o in shapes)


def test_balanced_ranks_have_twice_the_rank() -> None:
    model = peft.get_peft_model(SmolLayer(), peft.LoraConfig(r=8, target_modules=list(SMOLLM2)))
    attach(model, "qbara", pool=2)
    stir(model)
    for layer in layers(model).values():
        delta = delta_of(layer)
        assert delta.rank == 16
        assert np.linalg.matrix_rank(delta.dense()) == 16


def test_pooled_input_starts_with_the_variance_of_lora() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 576)
    expected = torch.nn.functional.linear(x, nn.Linear(576, 512, bias=False).weight).std()
    for pool, mean in ((32, False), (64, False), (2, True)):
        got = PooledIn(576, 512, pool, mean=mean)(x).std()
        assert (got / expected).item() == pytest.approx(1, abs=0.05)


def test_sizes_that_do_not_divide_are_refused_by_name_and_nothing_changes() -> None:
    for kind, sizes, place in (
        ("qbara", {"pool": 3}, "base_model.model.up has 88 inputs"),
        ("qbara", {"pool": 11}, "base_model.model.up has 120 outputs"),
        ("qahira", {"pool": 16, "repeat": 16}, "base_model.model.up has 120 outputs"),
        ("qalora", {"pool": 16, "repeat": 60}, "base_model.model.down has 88 outputs"),
    ):
        model = adapted("lora", {}, {})
        with pytest.raises(SchemeError, match=place):
            attach(model, kind, **sizes)
        for layer in layers(model).values():
            assert type(layer.lora_A["default"]) is type(layer.lora_B["default"]) is nn.Linear


def test_what_cannot_be_pooled_is_refused() -> None:
    model = adapted("lora", {}, {})
    with pytest.raises(SchemeError, match="'lora' pools nothing"):
        attach(model, "lora", pool=16)
    with pytest.raises(SchemeError, match="0 inputs"):
        attach(model, "qalora", pool=0)
    with pytest.raises(SchemeError, match="2 inputs and 3 outputs"):
        attach(model, "qbara", pool=2, repeat=3)
    with pytest.raises(SchemeError, match="no module"):
        attach(Model(), "qalora", pool=16)
    with pytest.raises(SchemeError, match="no module"):
        attach(model, "qalora", pool=16, adapter="other")
    table = nn.ModuleDict({"table": nn.Embedding(8, 16), "up": nn.Linear(16, 16)})
    table = peft.get_peft_model(table, peft.LoraConfig(r=2, target_modules=["table", "up"]))
    with pytest.raises(SchemeError, match=r"model\.table is no linear layer"):
        attach(table, "qalora", pool=16)


def test_a_bias_or_an_unknown_module_is_no_update() -> None:
    config = peft.LoraConfig(r=4, target_modules=["up"], lora_bias=True)
    model = peft.get_peft_model(Model(), config)
    with pytest.raises(SchemeError, match="bias"):
        delta_of(layers(model)["base_model.model.up"])
    model = adapted("lora", {}, {})
    layer = layers(model)["base_model.model.up"]
    layer.lora_A["default"] = nn.Identity()
    with pytest.raises(SchemeError, match="Identity"):
        delta_of(layer)


@pytest.mark.parametrize("kind", ["qalora", "qahira", "qbara"])
def test_peft_cannot_merge_them_wrongly(kind: str) -> None:
    model = adapted(kind, {"pool": 2}, {})
    stir(model)
    with pytest.raises((RuntimeError, AttributeError)):
        model.merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_factors_go_in_and_come_out(options: Any) -> None:
    layer = layers(adapted("lora", {}, options))["base_model.model.up"].double()
    generator = np.random.default_rng(0)
    delta = Delta(generator.standard_normal((4, 88)), generator.standard_normal((120, 4)), 0.25)
    set_factors(layer, delta)
    np.testing.assert_allclose(delta_of(layer).dense(), delta.dense(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(delta_of(layer).a, delta.a)
    with pytest.raises(SchemeError, match="rank 3"):
        set_factors(layer, Delta(delta.a[:3], delta.b[:, :3]))
    pooled = layers(adapted("qalora", {"pool": 16}, {}))["base_model.model.up"]
    with pytest.raises(SchemeError, match="PooledIn"):
        set_factors(pooled, delta)


def test_low_precision_and_checkpoint_copies_keep_their_types() -> None:
    for kind in ("qalora", "qahira", "qbara"):
        model = adapted(kind, {"pool": 2}, {}, base=Model().to(torch.bfloat16))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "as peft trains them"
        assert model(torch.randn(2, 88, dtype=torch.bfloat16)).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert adapted(kind, {"pool": 2}, {})(torch.randn(2, 88)).dtype == torch.bfloat16
        for name in ("lora_A", "lora_B"):
            assert repr(getattr(layers(model)["base_model.model.up"], name)["default"])


def test_modules_state_their_shapes() -> None:
    x = torch.randn(2, 3, 88)
    assert BlockSums(88, 16)(x).shape == (2, 3, 6)
    assert PooledIn(88, 5, 16)(x).shape == (2, 3, 5)
    assert RepeatOut(5, 120, 4)(torch.randn(2, 3, 5)).shape == (2, 3, 120)
    torch.testing.assert_close(BlockSums(88, 16)(x), x @ BlockSums(88, 16).dense().T)
