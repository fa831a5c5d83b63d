"""Writing adapters: plain peft opens them and computes the same; bytes, atomicity; the basis and its refusals."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import TinyModel
from tiny_adapters import save_peft
from transformers import AutoModelForCausalLM

from rqc.models import adapter_write
from rqc.models.adapter import Adapter, AdapterBasis, write_adapter
from rqc.models.adapter_export import plain_deltas
from rqc.models.adapter_frames import to_frame
from rqc.models.adapter_names import torch_names
from rqc.models.algebra import Read, dimensions
from rqc.models.checkpoint import Checkpoint
from rqc.models.delta import Delta
from rqc.models.description import HEAD, Description
from rqc.models.grid import Grid
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.errors import BasisMismatchError, InputError, ResourceError

IDS = np.random.Generator(np.random.PCG64(3)).integers(0, 96, 32)
Deltas = dict[str, Delta]


def linears(description: Description) -> dict[str, tuple[int, int]]:
    return {claim.weight: description.shape(claim) for claim in description.claims if claim.quantized}


def random_deltas(description: Description, kind: str) -> Deltas:
    """Updates of every linear, with a different rank in o_proj and a different scale in up_proj."""
    draw = np.random.Generator(np.random.PCG64(11))
    deltas = {}
    for name, (out, inputs) in linears(description).items():
        rank, scale = (3 if "o_proj" in name else 4), (0.5 if "up_proj" in name else 1.5)
        a, b = draw.normal(size=(rank, inputs)) / 10, draw.normal(size=(out, rank)) / 10
        if kind == "qalora":
            a = np.repeat(a[:, ::8], 8, axis=1)
        elif kind == "qbara":
            a, b = np.repeat(a[:, ::2], 2, axis=1), np.repeat(b[::2], 2, axis=0)
        elif kind == "qahira":
            a, scale = np.repeat(np.eye(inputs // 8), 8, axis=1), 1.0
            b = np.repeat(draw.normal(size=(out // 2, inputs // 8)) / 50, 2, axis=0)
        a, b = a.astype(np.float32).astype(np.float64), b.astype(np.float32).astype(np.float64)
        deltas[name] = Delta(a, b, scale, 0.5 + draw.random(out) if kind == "dora" else None)
    return deltas


def basis_of(directory: Path, sites: str, **changes: Any) -> AdapterBasis:
    description, checkpoint = Reference.load(directory).description, Checkpoint.open(directory)
    rotation = Rotation.parse(sites, "full", 5)
    basis = rotation.basis(dimensions(description)) if rotation.sites else None
    made = AdapterBasis(rotation, basis, checkpoint.fingerprint(), description.architecture.model_type)
    return replace(made, **changes)


def peft_model(directory: Path, adapter: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    wrapped = PeftModel.from_pretrained(model, str(adapter))
    assert not [key for key, value in wrapped.state_dict().items() if "lora_B" in key and not value.any()]
    return Reference(wrapped.merge_and_unload())


def same_function(reference: Reference, expected: Reference, tolerance: float) -> None:
    found, wanted = reference.logits(IDS), expected.logits(IDS)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def merged_into(directory: Path, deltas: Deltas) -> Reference:
    """The model with updates merged by rqc, cast once."""
    reference = Reference.load(directory)
    if HEAD in deltas:
        reference.untie()
    for name, delta in deltas.items():
        reference.set_weight(name, delta.merged(reference.read(name)).astype(np.float32))
    return reference


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/√r"])
@pytest.mark.parametrize("kind", ["lora", "dora", "qalora", "qbara", "qahira"])
def test_plain_peft_opens_it_and_computes_the_same(
    kind: str, rslora: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama16")
    description = Reference.load(directory).description
    deltas = random_deltas(description, kind)
    basis = basis_of(directory, "none", adapter_type=kind)
    write_adapter(tmp_path / "a", deltas, basis, rslora=rslora, dropout=0.1, base_model=str(directory))
    same_function(merged_into(directory, deltas), peft_model(directory, tmp_path / "a"), 3e-6)
    found = Adapter.open(tmp_path / "a", description)
    found.check(description, basis.base)
    assert found.kind == kind
    assert found.basis == basis
    assert found.deltas.keys() == deltas.keys()
    for name, delta in deltas.items():
        opened = found.deltas[name]
        assert np.array_equal(opened.a, delta.a)
        assert np.array_equal(opened.b, delta.b)
        assert abs(opened.scale - delta.scale) <= 1e-15
        if kind in ("qalora", "qahira"):
            assert opened.pooled(8) is not None
        if delta.magnitude is not None:
            assert opened.magnitude is not None
            assert np.array_equal(opened.magnitude, delta.magnitude.astype(np.float32))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["phi3", "gemma", "qwen2"])
def test_families(name: str, kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """phi3: parts with an A of their own each become one adapter of qkv_proj with stacked A's."""
    directory = tiny_model(name)
    description = Reference.load(directory).description
    deltas = random_deltas(description, kind)
    write_adapter(tmp_path / "a", deltas, None, torch_names=torch_names(description))
    same_function(merged_into(directory, deltas), peft_model(directory, tmp_path / "a"), 3e-6)
    reference = Reference.load(directory)
    for weight, delta in Adapter.open(tmp_path / "a", description).deltas.items():
        wanted = deltas[weight].merged(reference.read(weight))
        assert np.abs(delta.merged(reference.read(weight)) - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_a_packed_adapter_is_written_as_it_was_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("phi3")
    description = Reference.load(directory).description
    source = save_peft(directory, tmp_path / "source")
    deltas = Adapter.open(source, description).deltas
    write_adapter(tmp_path / "a", deltas, None, torch_names=torch_names(description))
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "a", source))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


def test_names_of_modules_are_as_good_as_names_of_parts(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What is trained on a packed module can be written without taking it apart."""
    description = Reference.load(tiny_model("phi3")).description
    draw = np.random.Generator(np.random.PCG64(1))
    whole = Delta(draw.normal(size=(2, 96)), draw.normal(size=(160, 2)))
    write_adapter(tmp_path / "a", {"model.layers.1.self_attn.qkv_proj.weight": whole}, None)
    parts = Adapter.open(tmp_path / "a", description).deltas
    stacked = np.concatenate([parts[f"model.layers.1.self_attn.{kind}_proj.weight"].dense() for kind in "qkv"])
    assert np.abs(stacked - whole.dense()).max() <= 1e-6


def test_a_packed_linear_needs_all_its_parts(tiny_model: TinyModel, tmp_path: Path) -> None:
    description = Reference.load(tiny_model("phi3")).description
    deltas = random_deltas(description, "lora")
    del deltas["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(InputError, match=r"no part for model.layers.0.self_attn.k_proj.weight"):
        write_adapter(tmp_path / "a", deltas, None, torch_names=torch_names(description))
    assert not list(tmp_path.iterdir())


def test_target_modules_cover_what_is_there_and_no_more(tiny_model: TinyModel, tmp_path: Path) -> None:
    description = Reference.load(tiny_model("llama16")).description
    deltas = random_deltas(description, "lora")

    def targets(part: Deltas) -> list[str]:
        write_adapter(tmp_path / "a", part, None)
        found: list[str] = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
        return found

    assert targets(deltas) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    second = {name: delta for name, delta in deltas.items() if "layers.1" in name and "q_proj" in name}
    assert targets(second) == ["model.layers.1.self_attn.q_proj"]
    same_function(merged_into(tiny_model("llama16"), second), peft_model(tiny_model("llama16"), tmp_path / "a"), 3e-6)


def test_equal_input_gives_equal_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    description = Reference.load(directory).description
    deltas, basis = random_deltas(description, "lora"), basis_of(directory, "r1,r4", residual=True, base_kind="w4")
    residual = {name: Delta(delta.a, delta.b) for name, delta in deltas.items()}
    for folder, order in (("a", 1), ("b", -1)):
        turned = dict(list(deltas.items())[::order])
        write_adapter(tmp_path / folder, turned, basis, residual=residual, dropout=0.05, base_model="base")
    names = ["adapter_config.json", "adapter_model.safetensors", "rqc_basis.json", "rqc_residual.safetensors"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as weights:
        assert weights.metadata() == {"format": "pt", "rqc_basis": basis.basis}
    found = Adapter.open(tmp_path / "a", description)
    assert found.residual.keys() == deltas.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(found.residual[name].dense(), Delta(deltas[name].a, deltas[name].b).dense())


def test_replacing_an_adapter_keeps_other_files_and_drops_stale_ones(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, path = tiny_model("llama16"), tmp_path / "a"
    description = Reference.load(directory).description
    deltas = random_deltas(description, "lora")
    write_adapter(path, deltas, basis_of(directory, "r1"))
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "state").write_text("1")
    write_adapter(path, deltas, None)
    assert (path / "checkpoints" / "state").read_text() == "1"
    assert Adapter.open(path, description).basis is None
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "b").mkdir()
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_failure_before_the_end_leaves_the_old_adapter(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    description = Reference.load(tiny_model("llama16")).description
    deltas = random_deltas(description, "lora")
    write_adapter(path, deltas, None)
    before = Adapter.open(path, description).fingerprint

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_write, "_write", full)
    with pytest.raises(ResourceError, match="no space"):
        write_adapter(path, random_deltas(description, "dora"), None)
    assert Adapter.open(path, description).fingerprint == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", range(4))
def test_a_crash_while_files_move_never_leaves_a_mixture(
    stop: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    directory = tiny_model("llama16")
    description = Reference.load(directory).description
    deltas = random_deltas(description, "lora")
    write_adapter(path, deltas, basis_of(directory, "r1"))
    old, moved = Adapter.open(path, description).fingerprint, 0
    real = os.replace

    def crash(source: Path, target: Path) -> None:
        nonlocal moved
        if moved == stop:
            raise OSError(5, "Input/output error")
        moved += 1
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    changed = {name: replace(delta, scale=9.0) for name, delta in deltas.items()}
    if stop == 3:
        write_adapter(path, changed, basis_of(directory, "r4"))
        assert Adapter.open(path, description).fingerprint != old
        return
    with pytest.raises(InputError, match="cannot be written"):
        write_adapter(path, changed, basis_of(directory, "r4"))
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors"):
        Adapter.open(path, description)


def test_what_no_directory_holds_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    description = Reference.load(directory).description
    deltas = random_deltas(description, "lora")
    name, delta = next(iter(deltas.items()))
    mixed = deltas | {name: replace(delta, magnitude=np.ones(delta.shape[0]))}
    huge = deltas | {name: replace(delta, a=1e39 * delta.a)}
    for bad, match in ((mixed, "DoRA on some"), ({}, "without any update"), (huge, "float32 cannot")):
        with pytest.raises(InputError, match=match):
            write_adapter(tmp_path / "a", bad, None)
    with pytest.raises(InputError, match="written with the residual"):
        write_adapter(tmp_path / "a", deltas, basis_of(directory, "r1", residual=True))
    with pytest.raises(InputError, match="written with the residual"):
        write_adapter(tmp_path / "a", deltas, basis_of(directory, "r1"), residual=deltas)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "a", deltas, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the basis


@pytest.fixture
def rotated(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """An adapter in the basis of r1 and r4."""
    directory = tiny_model("llama16")
    deltas = random_deltas(Reference.load(directory).description, "lora")
    write_adapter(tmp_path / "rotated", deltas, basis_of(directory, "r1,r4", grid=Grid(4, 32, False), base_kind="w4"))
    return tmp_path / "rotated"


def test_another_base_or_basis_is_named_by_both_hashes(rotated: Path, tiny_model: TinyModel) -> None:
    description = Reference.load(tiny_model("llama16")).description
    adapter = Adapter.open(rotated, description)
    assert adapter.basis is not None
    adapter.check(description, adapter.basis.base)
    with pytest.raises(InputError, match="ffff") as caught:
        adapter.check(description, "ffff")
    assert adapter.basis.base in caught.value.message
    other = replace(adapter.basis, basis="0" * 64)
    with pytest.raises(BasisMismatchError, match="0" * 64) as mismatch:
        replace(adapter, basis=other).check(description, other.base)
    assert str(adapter.basis.basis) in mismatch.value.message
    assert mismatch.value.hint


def test_a_lost_basis_file_is_noticed(rotated: Path, tiny_model: TinyModel) -> None:
    description = Reference.load(tiny_model("llama16")).description
    (rotated / "rqc_basis.json").unlink()
    with pytest.raises(InputError, match=r"rqc_basis\.json is gone"):
        Adapter.open(rotated, description)


def test_weights_and_basis_of_different_adapters_are_noticed(rotated: Path, tiny_model: TinyModel) -> None:
    directory = tiny_model("llama16")
    description = Reference.load(directory).description
    (rotated / "rqc_basis.json").write_bytes(basis_of(directory, "r4").to_bytes())
    with pytest.raises(InputError, match="the weights are of the basis"):
        Adapter.open(rotated, description)


def test_weights_saved_again_by_peft_keep_the_basis_beside_them(rotated: Path, tiny_model: TinyModel) -> None:
    description = Reference.load(tiny_model("llama16")).description
    weights = rotated / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    assert Adapter.open(rotated, description).basis is not None


def test_a_lost_residual_is_noticed(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    description = Reference.load(directory).description
    deltas = random_deltas(description, "lora")
    basis = basis_of(directory, "r1", residual=True, base_kind="w4", grid=Grid(4, 32))
    write_adapter(tmp_path / "a", deltas, basis, residual=deltas)
    (tmp_path / "a" / "rqc_residual.safetensors").unlink()
    with pytest.raises(InputError, match=r"rqc_residual\.safetensors is missing"):
        Adapter.open(tmp_path / "a", description)


def test_a_basis_goes_through_json_and_back(tiny_model: TinyModel) -> None:
    for sites in ("none", "r1,r2,r3,r4"):
        for grid in (None, Grid(4, 64, False, "mse")):
            basis = basis_of(tiny_model("llama16"), sites, grid=grid, activations=6, adapter_type="qahira")
            assert AdapterBasis.from_json(json.loads(basis.to_bytes())) == basis


def damaged(change: str, value: dict[str, Any]) -> object:
    match change:
        case "newer":
            return value | {"format_version": 2}
        case "another format":
            return value | {"format": "x"}
        case "kind":
            return value | {"base_kind": "w5"}
        case "type":
            return value | {"adapter_type": "lokr"}
        case "no rotation":
            return {key: item for key, item in value.items() if key != "rotation"}
        case "site":
            return value | {"rotation": value["rotation"] | {"sites": ["r9"]}}
        case "no hash":
            return value | {"rotation": value["rotation"] | {"basis": None}}
        case "grid":
            return value | {"grid": {"bits": 5, "group_size": 32}}
        case "grid keys":
            return value | {"grid": {"bits": 4, "size": 32}}
        case "base":
            return value | {"base": "x"}
        case "residual":
            return value | {"residual": "no"}
    return [value]


@pytest.mark.parametrize(
    "change",
    ["newer", "another format", "kind", "type", "no rotation", "site", "no hash", "grid", "grid keys", "base",
     "residual", "a list"],
)  # fmt: skip
def test_a_damaged_basis_is_one_clear_line(change: str, rotated: Path, tiny_model: TinyModel) -> None:
    path = rotated / "rqc_basis.json"
    path.write_text(json.dumps(damaged(change, json.loads(path.read_text()))))
    with pytest.raises(InputError) as caught:
        Adapter.open(rotated, Reference.load(tiny_model("llama16")).description)
    assert "\n" not in caught.value.message
    assert caught.value.hint


# --- back into the model's own basis


def export(adapter: Path, description: Description, read: Read, directory: Path) -> None:
    """Write an adapter in the model's own basis."""
    opened = Adapter.open(adapter, description, read)
    rotation = Rotation.parse("none") if opened.basis is None else opened.basis.rotation
    plain = plain_deltas(opened.deltas, opened.residual, description, rotation, read)
    write_adapter(directory, plain, None, torch_names=torch_names(description))


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gemma", "qwen3"])
def test_an_exported_adapter_is_the_trained_one_for_any_loader(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    reference = Reference.load(directory)
    description, read = reference.description, Checkpoint.open(directory).read
    basis = basis_of(directory, "r1,r2,r4")
    plain = random_deltas(description, "lora")
    framed = {name: to_frame(name, delta, description, basis.rotation, read) for name, delta in plain.items()}
    write_adapter(tmp_path / "framed", framed, basis, torch_names=torch_names(description))
    export(tmp_path / "framed", description, read, tmp_path / "plain")
    assert not (tmp_path / "plain" / "rqc_basis.json").exists()
    same_function(peft_model(directory, tmp_path / "plain"), merged_into(directory, plain), 1e-5)
    rotated = Reference.load(directory)  # what was trained: the rotated model with its adapter
    rotated.rotate(basis.rotation, tied=description.architecture.tied)
    for weight, delta in framed.items():
        rotated.set_weight(weight, delta.merged(rotated.read(weight)).astype(np.float32))
    same_function(peft_model(directory, tmp_path / "plain"), rotated, 1e-5)


def test_an_exported_dora_and_one_that_has_no_counterpart(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("phi3")
    reference = Reference.load(directory)
    description, read = reference.description, Checkpoint.open(directory).read
    basis = basis_of(directory, "r1,r4", adapter_type="dora")
    deltas = random_deltas(description, "dora")
    inputs = {name: delta for name, delta in deltas.items() if "o_proj" not in name and "down_proj" not in name}
    framed = {name: to_frame(name, delta, description, basis.rotation, read) for name, delta in inputs.items()}
    write_adapter(tmp_path / "framed", framed, basis, torch_names=torch_names(description))
    export(tmp_path / "framed", description, read, tmp_path / "plain")
    same_function(peft_model(directory, tmp_path / "plain"), merged_into(directory, inputs), 1e-5)
    write_adapter(tmp_path / "all", deltas, basis, torch_names=torch_names(description))
    with pytest.raises(BasisMismatchError, match=r"o_proj|down_proj"):
        export(tmp_path / "all", description, read, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_exported_loftq_adapter_gives_back_what_its_base_lacked(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    description, read = Reference.load(directory).description, Checkpoint.open(directory).read
    deltas = random_deltas(description, "lora")
    residual = {name: Delta(delta.a, delta.b[::-1].copy()) for name, delta in deltas.items()}
    basis = basis_of(directory, "none", residual=True, base_kind="w2", grid=Grid(2, 32))
    write_adapter(tmp_path / "a", deltas, basis, residual=residual)
    export(tmp_path / "a", description, read, tmp_path / "plain")
    for name, delta in Adapter.open(tmp_path / "plain", description).deltas.items():
        np.testing.assert_allclose(delta.dense(), deltas[name].dense() - residual[name].dense(), rtol=0, atol=1e-6)


def test_exporting_a_plain_adapter_copies_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    reference = Reference.load(directory)
    source = save_peft(directory, tmp_path / "a", use_dora=True, use_rslora=True)
    export(source, reference.description, reference.read, tmp_path / "b")
    same_function(peft_model(directory, tmp_path / "b"), peft_model(directory, source), 1e-6)


def test_a_basis_of_format_1_tells_a_grid_by_the_keys_that_its_readers_know(tiny_model: TinyModel) -> None:
    basis = basis_of(tiny_model("llama16"), "none", base_kind="w2", grid=Grid(2, 32, False, "mse"))
    assert basis.to_json()["grid"] == {"bits": 2, "group_size": 32, "symmetric": False, "clip": "mse"}
    assert AdapterBasis.from_json(basis.to_json()) == basis
