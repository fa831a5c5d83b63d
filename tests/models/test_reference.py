"""The PyTorch side: folding and rotating a model in place leaves its function alone, in every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import MODELS, TinyModel

from rqc.models.fake_quant import ActivationGrid, quantize_inputs, recording
from rqc.models.grid import fake_quantize_activations
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.errors import CheckpointError, RotationError

IDS = np.random.Generator(np.random.PCG64(3)).integers(0, 96, 48)
TIED = ("llama-tied", "smollm3", "gemma", "gemma2", "gemma3")


def valid_sites(name: str) -> str:
    return "r2,r3,r4" if name in ("olmo2", "gemma2", "gemma3") else "r1,r2,r3,r4"


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", MODELS)
def test_rotating_in_place_keeps_the_function(name: str, tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model(name, initializer_range=0.1))
    before = reference.logits(IDS)
    weights = {part: view.weight.clone() for part, view in reference.parts.items()}
    reference.rotate(Rotation.parse(valid_sites(name)), tied=name in TIED)
    assert distance(reference.logits(IDS), before) < 3e-6
    changed = [part for part, weight in weights.items() if not torch.equal(weight, reference.parts[part].weight)]
    assert len(changed) >= 3 * reference.description.architecture.layers


@pytest.mark.parametrize("site", ["r1", "r2", "r4"])
def test_the_online_half_alone_changes_the_function(
    site: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference.load(tiny_model("llama-tied", initializer_range=0.1))
    before = reference.logits(IDS)
    monkeypatch.setattr(Reference, "_fold", lambda self, name, folds: None)
    reference.rotate(Rotation.parse(site), tied=True)
    moved = distance(reference.logits(IDS), before)
    assert moved > 0.05 if site != "r2" else moved == 0  # r2 has no online half


def test_experts_unpacked_compute_what_transformers_does(tiny_model: TinyModel) -> None:
    directory = tiny_model("mixtral", initializer_range=0.1)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(torch.from_numpy(IDS)[None]).logits[0].numpy()
    reference = Reference.load(directory)
    assert distance(reference.logits(IDS), expected) < 1e-6
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in reference.parts


def test_packed_projections_go_by_the_names_of_their_parts(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("phi3"))
    packed = reference.model.model.layers[1].self_attn.qkv_proj.weight
    views = [reference.parts[f"model.layers.1.self_attn.{kind}_proj.weight"].weight for kind in "qkv"]
    assert torch.equal(torch.cat(views), packed)
    views[2].fill_(7.0)  # a view: writing to it writes to the model
    assert (packed[-views[2].shape[0] :] == 7).all()


def test_untying_lets_head_and_embedding_differ(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama-tied"))
    before = reference.logits(IDS)
    reference.untie()
    assert np.array_equal(reference.logits(IDS), before)
    reference.set_weight("lm_head.weight", np.zeros((96, 96), np.float32))
    assert not reference.logits(IDS).any()
    assert reference.parts["model.embed_tokens.weight"].weight.any()


def test_a_refused_site_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(RotationError, match="r1 cannot be folded into gemma2"):
        Reference.load(tiny_model("gemma2")).rotate(Rotation.parse("r1"), tied=True)


def test_a_damaged_directory_is_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    source = tiny_model("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reference.load(tmp_path)


@pytest.mark.parametrize("grid", [ActivationGrid(8, 32), ActivationGrid(4, -1)])
def test_linears_see_rounded_inputs_and_are_recorded(grid: ActivationGrid, tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama-bias", initializer_range=0.1))
    reference.rotate(Rotation.parse("r4"), tied=False)
    name = "model.layers.0.mlp.down_proj.weight"
    with recording(reference, [name]) as plain:
        reference.logits(IDS)
    quantize_inputs(reference, {name: grid})
    with recording(reference, [name]) as rounded:
        reference.logits(IDS)
    x = rounded.inputs[name]
    assert np.array_equal(x, fake_quantize_activations(plain.inputs[name], grid.block, grid.bits))
    assert np.array_equal(grid.codes(x), grid.codes(plain.inputs[name]))  # rounding twice is rounding once
    part = reference.parts[name]
    assert distance(rounded.outputs[name], x @ part.weight.numpy().T + part.bias.numpy()) < 1e-6
