"""The PyTorch half of rotations: the factored product and its gradient, and that adapters see what they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny import MODELS, TinyModel
from torch import Tensor, nn

from rqc.compiler.importer import import_model
from rqc.compiler.passlist import frame
from rqc.compiler.recipe import Recipe
from rqc.models.fake_quant import ActivationGrid, fake_quantize_ste, round_inputs_ste, training_grids
from rqc.models.online import TorchRotation, rotate_input
from rqc.models.reference import Reference
from rqc.models.rotation import Orthogonal, Rotation
from rqc.passes.base import weight_of
from rqc.runtime.errors import RotationError

IDS = torch.from_numpy(np.random.Generator(np.random.PCG64(3)).integers(3, 96, (2, 24)))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = ("llama-tied", "smollm3", "gemma", "gemma2", "gemma3")
EVERYWHERE = Rotation.parse("r1,r2,r3,r4")


def orthogonal(n: int, kind: str = "full", site: str = "r1") -> Orthogonal:
    q = getattr(Rotation(frozenset([site]), kind, 3), site)(n)
    assert isinstance(q, Orthogonal)
    return q


def rotation_for(name: str) -> Rotation:
    return Rotation.parse("r2,r3,r4") if name in ("olmo2", "gemma2", "gemma3") else EVERYWHERE


def with_adapter(model: Any, seed: int = 0, **options: Any) -> Any:
    """The model wrapped by plain peft, LoRA on every linear of the blocks, B away from zero."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM", **options)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def merge(into: Reference, adapted: Reference) -> None:
    """W ← W + c B A by hand: the rotated model that an engine holds."""
    for label, part in into.parts.items():
        layer: Any = adapted.parts[label].module
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            part.weight.add_(layer.scaling["default"] * b @ a)


@pytest.mark.parametrize("kind", ["full", "block"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [16, 96, 152, 268, 1536])
def test_the_product_is_that_of_the_matrix(n: int, inverse: bool, kind: str) -> None:
    for q in (orthogonal(n, kind), orthogonal(n, kind, "r4"), orthogonal(n, kind).with_repeat(3)):
        x = torch.randn(2, 5, q.n, dtype=torch.float64)
        expected = q.apply_inverse(x.numpy()) if inverse else q.apply(x.numpy())
        assert distance(TorchRotation(q, inverse=inverse)(x), torch.from_numpy(expected)) < 1e-14


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [20, 96])
def test_the_gradient_is_that_of_the_matrix(n: int, inverse: bool) -> None:
    q = orthogonal(n)
    module = TorchRotation(q, inverse=inverse)
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    upstream = torch.randn(3, n, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(module(x), x, upstream)
    matrix = torch.from_numpy(q.dense())
    assert distance(gradient, upstream @ (matrix if inverse else matrix.T)) < 1e-13


def test_factors_keep_their_type_and_stay_out_of_checkpoints() -> None:
    module = nn.Sequential(TorchRotation(orthogonal(96)), nn.Linear(96, 4)).to(torch.bfloat16)
    rotation: Any = module[0]
    assert {buffer.dtype for buffer in rotation.buffers()} == {torch.float64}
    assert list(module.state_dict()) == ["1.weight", "1.bias"]
    assert rotation(torch.randn(2, 96, dtype=torch.float16)).dtype == torch.float16
    x = torch.randn(4, 96)
    exact = TorchRotation(orthogonal(96), dtype=torch.float32)
    expected = exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(x), expected)  # autocast would leave three digits
    with pytest.raises(RotationError, match="order 96 met shape"):
        exact(torch.randn(2, 48))


@pytest.mark.parametrize("name", MODELS)
def test_folded_weights_are_the_graphs_to_the_last_bit(name: str, tiny_model: TinyModel) -> None:
    directory, rotation = tiny_model(name, initializer_range=0.1), rotation_for(name)
    for tied in ("keep", "untie"):
        imported = import_model(directory)
        for step in frame(Recipe.from_values({"tied": tied}), imported.description, rotation):
            step(imported.model)
        reference = Reference.load(directory)
        reference.fold(rotation, tied=name in TIED and tied == "keep")
        compared = 0
        for label, value in imported.model.graph.initializers.items():
            weight = weight_of(value)
            if weight is not None and (label in reference.parts or label.endswith("bias") or "norm" in label):
                expected = weight.float32() if len(weight.shape) == 2 else weight.read().astype(np.float32)
                assert np.array_equal(reference.read(label).astype(np.float32), expected), label
                compared += 1
        assert compared >= 6 * reference.description.architecture.layers


@pytest.mark.parametrize("name", ["llama-tied", "llama-bias", "qwen3", "granite"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_adapters_see_rotated_inputs(name: str, options: dict[str, Any], tiny_model: TinyModel) -> None:
    directory, tied = tiny_model(name, initializer_range=0.1), name in TIED
    reference = Reference.load(directory)
    reference.fold(EVERYWHERE, tied=tied)
    wrapped = with_adapter(reference.model, **options)
    reference.rotate_online(EVERYWHERE, tied=tied)
    plain = Reference.load(directory)
    plain.fold(EVERYWHERE, tied=tied)
    merge(plain, reference)
    plain.rotate_online(EVERYWHERE, tied=tied)
    assert distance(logits(wrapped), logits(plain.model)) < 1e-5
    with wrapped.disable_adapter():
        assert distance(logits(wrapped), logits(plain.model)) > 0.05


def inside(reference: Reference) -> None:
    """A linear with the rotation inside of it, which peft wraps."""
    q = TorchRotation(orthogonal(152, site="r4"))
    for claim in reference.description.claims:
        if claim.linear.path.endswith("down_proj"):
            linear: Any = reference.parts[claim.weight].module
            plain = linear.forward
            linear.forward = lambda x, plain=plain: plain(q(x))


@pytest.mark.parametrize("place", [lambda reference: reference.rotate_online(Rotation.parse("r4"), tied=False), inside])
def test_a_rotation_below_the_adapter_is_seen_to_be_wrong(
    place: Callable[[Reference], None], tiny_model: TinyModel
) -> None:
    """What the tests above would catch: the base function is right in these placements, the adapter's is not."""
    directory, rotation = tiny_model("llama", initializer_range=0.1), Rotation.parse("r4")
    right, wrong = Reference.load(directory), Reference.load(directory)
    for reference in (right, wrong):
        reference.fold(rotation, tied=False)
    place(wrong)
    wrapped, misplaced = with_adapter(right.model), with_adapter(wrong.model)
    right.rotate_online(rotation, tied=False)
    with wrapped.disable_adapter(), misplaced.disable_adapter():
        assert distance(logits(misplaced), logits(wrapped)) < 1e-5
    assert distance(logits(misplaced), logits(wrapped)) > 0.01


def test_hooks_sit_on_the_wrapper_and_only_once(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama-tied"))
    reference.fold(EVERYWHERE, tied=True)
    with_adapter(reference.model)
    reference.rotate_online(EVERYWHERE, tied=True)
    part = reference.parts["model.layers.0.mlp.down_proj.weight"]
    assert part.module is not part.linear
    assert len(part.module._forward_pre_hooks) == 1
    assert not part.linear._forward_pre_hooks
    with pytest.raises(RotationError, match="rotated online already"):
        reference.rotate_online(EVERYWHERE, tied=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_through_every_site(dtype: torch.dtype, tiny_model: TinyModel) -> None:
    gradients = []
    for checkpointing in (False, True):
        reference = Reference.load(tiny_model("llama-tied", initializer_range=0.1))
        reference.fold(EVERYWHERE, tied=True)
        reference.model.to(dtype)
        wrapped = with_adapter(reference.model)
        reference.rotate_online(EVERYWHERE, tied=True)
        round_inputs_ste(reference, training_grids(reference.description, 8, 32))
        if checkpointing:
            wrapped.gradient_checkpointing_enable()
            wrapped.enable_input_require_grads()
        wrapped.train()
        wrapped(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
        assert len(found) == 2 * 7 * 2
        assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in found.values())
        gradients.append(found)
    plain, checkpointed = gradients
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_gradients_are_those_of_the_plain_model(tiny_model: TinyModel) -> None:
    """The gradient of a rotated factor is the rotated gradient: A' = A Q, so dL/dA = dL/dA' Qᵀ."""
    directory, rotation = tiny_model("llama", initializer_range=0.1), Rotation.parse("r4")
    reference, plain = Reference.load(directory), Reference.load(directory)
    reference.fold(rotation, tied=False)
    wrapped, unrotated = with_adapter(reference.model), with_adapter(plain.model)
    q = orthogonal(152, site="r4").dense() * rotation.r4_signs(152)[:, None]
    path = "model.layers.1.mlp.down_proj.weight"
    rotated_a, plain_a = (r.parts[path].module.lora_A["default"].weight for r in (reference, plain))
    for r, model in ((reference, wrapped), (plain, unrotated)):
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layers.1.mlp.down_proj" not in name:
                nn.init.zeros_(parameter)
        assert r.parts[path].module.lora_B["default"].weight.abs().max() > 0
    rotated_a.data.copy_(torch.from_numpy(plain_a.detach().double().numpy() @ q))
    reference.rotate_online(rotation, tied=False)
    for model in (wrapped, unrotated):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert distance(rotated_a.grad.double() @ torch.from_numpy(q).T, plain_a.grad.double()) < 1e-4


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("block", [-1, 16, 32])
@pytest.mark.parametrize("width", [40, 96])
def test_straight_through_rounding(width: int, block: int, bits: int) -> None:
    grid = ActivationGrid(bits, block)
    x = torch.randn(6, 3, width) * torch.logspace(-3, 3, 6)[:, None, None]
    x[2], x[4] = 0, x[4] * 1e-42
    x.requires_grad_()
    rounded = fake_quantize_ste(x, grid)
    assert torch.equal(rounded, grid.round(x.detach()))
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(rounded, x, upstream)
    assert torch.equal(gradient, upstream)
    half = x.detach().to(torch.bfloat16)
    assert torch.equal(fake_quantize_ste(half, grid), grid.round(half.float()).to(torch.bfloat16))


def test_base_and_adapter_both_read_rounded_inputs_behind_the_rotation(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama", initializer_range=0.1))
    reference.fold(EVERYWHERE, tied=False)
    with_adapter(reference.model)
    reference.rotate_online(EVERYWHERE, tied=False)
    grids = training_grids(reference.description, 4, 32)
    assert set(grids.values()) == {ActivationGrid(4, -1)}
    assert not any("lm_head" in name for name in grids)
    path = "model.layers.0.mlp.down_proj.weight"
    part, seen = reference.parts[path], dict[str, Tensor]()
    layer: Any = part.module
    round_inputs_ste(reference, grids)
    part.linear.register_forward_pre_hook(lambda _, args: seen.update(base=args[0]))
    layer.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.update(adapter=args[0]))
    mlp: Any = reference.model.get_submodule("model.layers.0.mlp")
    mlp.act_fn.register_forward_hook(lambda _, args, out: seen.update(gate=out))
    mlp.up_proj.register_forward_hook(lambda _, args, out: seen.update(up=out))
    logits(reference.model)
    hidden = TorchRotation(orthogonal(152, site="r4"))(seen["gate"] * seen["up"])
    assert torch.equal(seen["base"], seen["adapter"])
    assert torch.equal(seen["base"], grids[path].round(hidden))


def test_routers_are_not_rounded(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("mixtral"))
    grids = training_grids(reference.description, 8, 32)
    assert not any(name.endswith("mlp.gate.weight") for name in grids)
    assert grids["model.layers.0.mlp.experts.3.down_proj.weight"] == ActivationGrid(8, 32)


def test_a_hook_follows_the_model_to_another_type(tiny_model: TinyModel) -> None:
    linear = nn.Linear(96, 8, bias=False)
    rotate_input(linear, TorchRotation(orthogonal(96)))
    x = torch.randn(3, 96)
    expected = linear(x)
    assert distance(linear.to(torch.bfloat16)(x.to(torch.bfloat16)).float(), expected) < 0.02
