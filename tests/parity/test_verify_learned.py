"""Engines and adapters in a learned basis: they carry its matrices, agree with PyTorch, refuse what is of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learned_files import random_rotation, write_random
from tiny import TinyModel, give_voice
from tiny_adapters import basis_of, failed, random_deltas, relative, verified

import rqc
from rqc.compiler.api import compile_engine
from rqc.models.adapter import write_adapter
from rqc.models.adapter_basis import ROTATION_FILE
from rqc.models.adapter_frames import to_frame, to_plain
from rqc.models.algebra import dimensions
from rqc.models.grid import Grid
from rqc.models.reference import Reference
from rqc.models.rotation_file import RotationFile
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import BasisMismatchError, InputError, RotationError, RqcError
from rqc.runtime.extract import extract


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama-tied")


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    return write_random(model, tmp_path / "learned.safetensors")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-tied", {"scheme": "fp32", "verify_each": True}),
        ("llama-tied", {"scheme": "w4a16", "tied": "untie"}),
        ("phi3", {"scheme": "w4a4", "verify_each": True}),
        ("qwen3-moe", {"scheme": "w4a8", "rotate": "r1,r2,r3,r4"}),
    ],
    ids=str,
)
def test_engines_agree_with_pytorch(
    family: str, options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(family)
    file = write_random(directory, tmp_path / "learned.safetensors")
    engine = tmp_path / "e.plan"
    compile_engine(directory, engine, rotation=file, **options)
    assert not failed(verified(engine, directory, None))
    with EngineFile.open(engine) as opened:
        rotation = opened.manifest["rotation"]
        assert (sorted(rotation["learned"]), rotation["seed"]) == (["r1", "r2"], 2)
        assert rotation["basis"] != compile_basis(directory, rotation["sites"])


def compile_basis(directory: Path, sites: list[str]) -> str:
    """The basis of the Hadamards of those sites."""
    basis = basis_of(directory, ",".join(sites)).basis
    assert basis is not None
    return basis


def test_the_matrices_in_an_engine_compile_the_same_one(model: Path, file: Path, tmp_path: Path) -> None:
    first = compile_engine(model, tmp_path / "a.plan", rotation=file, rotate="r1,r4")
    extract(tmp_path / "a.plan", tmp_path / "parts")
    second = compile_engine(model, tmp_path / "b.plan", rotation=tmp_path / "parts" / "rotation.safetensors")
    assert first.sha256 == second.sha256
    assert RotationFile.read(tmp_path / "parts" / "rotation.safetensors").rotation.learned is not None
    assert str(tmp_path).encode() not in (tmp_path / "a.plan").read_bytes()


def test_an_adapter_is_trained_in_a_learned_basis(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    directory = give_voice(tiny_model("llama-tied"))
    file, adapter = write_random(directory, tmp_path / "learned.safetensors"), tmp_path / "adapter"
    quick: dict[str, Any] = {"rank": 2, "max_steps": 2, "batch_size": 2, "seq_len": 32, "lr": 1e-2}
    rqc.finetune(directory, data, adapter, rotation=file, export_plain=tmp_path / "plain", **quick)
    assert (adapter / ROTATION_FILE).is_file()
    for merge in ("fold", "branch"):
        engine = tmp_path / f"{merge}.plan"
        compile_engine(
            directory,
            engine,
            adapter=adapter,
            merge=merge,
            scheme="fp32" if merge == "fold" else "w4a16",
            min_survival=0.0,
        )
        assert not failed(verified(engine, directory, adapter))
    (adapter / ROTATION_FILE).unlink()
    with pytest.raises(InputError, match="matrices of a stored rotation are missing"):
        compile_engine(directory, tmp_path / "x.plan", adapter=adapter)
    other = write_random(tiny_model("qwen2"), tmp_path / "other.safetensors")
    with pytest.raises(RotationError, match="learned for the model"):
        rqc.finetune(directory, data, tmp_path / "y", rotation=other, **quick)


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "llama-bias"])
def test_updates_commute_with_learned_folds(name: str, tiny_model: TinyModel) -> None:
    """rotate(W + BA) = rotate(W) + carried(BA), and back to where it came from."""
    directory = tiny_model(name)
    rotation, reference = random_rotation(directory), Reference.load(directory)
    description, read = reference.description, reference.read
    plain = Reference.load(directory)
    plain.fold(rotation, tied=description.architecture.tied)
    for name, delta in random_deltas(directory).items():
        framed = to_frame(name, delta, description, rotation, read)
        back = to_plain(name, framed, description, rotation, read)
        assert relative(back.dense(), delta.dense()) < 1e-9
        reference.set_weight(name, (reference.read(name) + delta.dense()).astype(np.float32))
        assert relative(framed.dense(), delta.dense()) > 0.1
    merged = reference
    merged.fold(rotation, tied=description.architecture.tied)
    fresh = Reference.load(directory)
    for name, delta in random_deltas(directory).items():
        framed = to_frame(name, delta, description, rotation, fresh.read)
        assert relative(merged.read(name), plain.read(name) + framed.dense()) < 1e-6


@pytest.mark.parametrize("sites", ["none", "r1,r4"])
def test_adapters_of_another_basis_are_carried_into_a_learned_one(
    sites: str, model: Path, file: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    basis = None if sites == "none" else basis_of(model, sites)
    write_adapter(adapter, random_deltas(model), basis)
    compile_engine(
        model, tmp_path / "e.plan", adapter=adapter, rotation=file, merge="branch", scheme="w4a16", min_survival=0.0
    )
    assert not failed(verified(tmp_path / "e.plan", model, adapter))


def test_an_adapter_that_cannot_leave_a_learned_basis_is_refused_elsewhere(
    model: Path, file: Path, tmp_path: Path
) -> None:
    rotation = random_rotation(model)
    fields = {"grid": Grid(4, 16), "base_kind": "w4", "rotation": rotation}
    description = Reference.load(model).description
    basis = basis_of(model, "r1", **fields, basis=rotation.basis(dimensions(description)))
    adapter = tmp_path / "adapter"
    write_adapter(adapter, random_deltas(model), basis)
    compile_engine(model, tmp_path / "own.plan", adapter=adapter, min_survival=0.0)  # brings its matrices along
    assert not failed(verified(tmp_path / "own.plan", model, adapter))
    other = write_random(model, tmp_path / "other.safetensors", seed=7)
    for options in ({"rotation": other}, {"rotation_seed": 1}, {"rotate": "r1,r4"}):
        with pytest.raises(BasisMismatchError, match="was trained in basis"):
            compile_engine(model, tmp_path / "x.plan", adapter=adapter, **options)


REFUSED: dict[str, tuple[dict[str, Any], type[RqcError], str]] = {
    "seed": ({"rotation_seed": 1}, InputError, "has its own"),
    "kind": ({"hadamard": "block"}, InputError, "has its own"),
    "left out": ({"rotate": "r3,r4"}, InputError, "leaves out all"),
    "none": ({"rotate": "none"}, InputError, "leaves out all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_a_file_is_refused(case: str, model: Path, file: Path, tmp_path: Path) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        compile_engine(model, tmp_path / "x.plan", rotation=file, **options)


def test_another_models_file_and_a_recipe(model: Path, file: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(RotationError, match="learned for the model"):
        compile_engine(tiny_model("llama16"), tmp_path / "x.plan", rotation=file)
    recipe = tmp_path / "r.toml"
    shutil.copy(file, tmp_path / "copy.safetensors")
    recipe.write_text('scheme = "w4a16"\nrotation = "copy.safetensors"\n')
    one = compile_engine(model, tmp_path / "a.plan", recipe=recipe)
    assert (
        one.sha256
        != compile_engine(
            model, tmp_path / "c.plan", recipe=recipe, rotation=write_random(model, tmp_path / "d.safetensors", seed=3)
        ).sha256
    )
    assert one.sha256 == compile_engine(model, tmp_path / "b.plan", scheme="w4a16", rotation=file).sha256
