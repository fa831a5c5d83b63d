"""Adapters on their way into an engine: the function is peft's, frames and grids fit or are refused, nothing is rounded
away in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyModel
from tiny_adapters import (
    IDS,
    W4,
    Lines,
    basis_of,
    engine_logits,
    mean_kl,
    peft_logits,
    random_deltas,
    save_merged,
    save_peft,
    talking,
)

from rqc.compiler.api import compile_engine
from rqc.compiler.importer import import_model
from rqc.models.adapter import Adapter, write_adapter
from rqc.models.adapter_frames import to_frame
from rqc.models.algebra import dimensions
from rqc.models.checkpoint import Checkpoint
from rqc.models.delta import Delta
from rqc.models.grid import Grid
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import BasisMismatchError, InputError, SchemeError, UnsupportedModelError

FAMILIES = ("llama", "llama-bias", "llama-tied", "smollm3", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma")
MIXTURES = ("mixtral", "qwen3-moe")
POST_NORM = ("olmo2", "gemma2", "gemma3")


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES, *POST_NORM])
def test_a_folded_adapter_is_what_peft_computes_in_every_family(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    attention = {"target_modules": [f"{kind}_proj" for kind in "qkvo"]}  # peft has no linears for experts
    adapter = save_peft(directory, tmp_path / "adapter", use_rslora=True, **(attention if name in MIXTURES else {}))
    sites = "r2,r3,r4" if name in POST_NORM else "r1,r2,r3,r4"
    report = compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32", rotate=sites)
    expected = peft_logits(directory, adapter, IDS)
    assert mean_kl(expected, engine_logits(tmp_path / "e.plan")) <= 1e-7
    assert report.survival is not None
    assert min(report.survival.values()) > 0.999
    compile_engine(directory, tmp_path / "plain.plan", scheme="fp32", rotate="none")
    assert mean_kl(expected, engine_logits(tmp_path / "plain.plan")) > 1e-4  # the adapter does change the function


@pytest.mark.parametrize("sites", ["none", "r1", "r2,r4", "r1,r4", "r1,r2,r3,r4"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_every_frame_takes_every_kind(
    name: str, config: dict[str, Any], sites: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    adapter = save_peft(directory, tmp_path / "adapter", **config)
    compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32", rotate=sites)
    assert mean_kl(peft_logits(directory, adapter, IDS), engine_logits(tmp_path / "e.plan")) <= 1e-7


def trained_in(directory: Path, sites: str, plain: Path, target: Path, **fields: Any) -> Path:
    """The adapter `plain` as training in a basis would have written it."""
    imported = import_model(directory)
    rotation, read = Rotation.parse(sites), imported.checkpoint.read
    opened = Adapter.open(plain, imported.description)
    deltas = {n: to_frame(n, delta, imported.description, rotation, read) for n, delta in opened.deltas.items()}
    write_adapter(target, deltas, basis_of(directory, sites, adapter_type=opened.kind, **fields))
    return target


@pytest.mark.parametrize("sites", ["none", "r1,r4", "r1,r2,r3,r4"])
@pytest.mark.parametrize("name", ["llama-bias", "llama-tied", "gemma"])
def test_an_adapter_brings_its_basis_along(name: str, sites: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name)
    plain = save_peft(directory, tmp_path / "plain")
    adapter = trained_in(directory, sites, plain, tmp_path / "adapter")
    expected = peft_logits(directory, plain, IDS)
    report = compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32")
    assert report.rotation == {"chosen": str(Rotation.parse(sites)), "scores": None}
    assert mean_kl(expected, engine_logits(tmp_path / "e.plan")) <= 1e-7
    assert EngineFile.open(tmp_path / "e.plan").manifest["rotation"]["sites"] == sorted(Rotation.parse(sites).sites)
    for options in ({"rotate": "r2,r4"}, {"rotate": "none"}, {"rotate": "r1,r2", "rotation_seed": 3}):
        compile_engine(directory, tmp_path / "other.plan", adapter=adapter, scheme="fp32", **options)
        assert mean_kl(expected, engine_logits(tmp_path / "other.plan")) <= 1e-7


def test_a_seed_of_its_own_is_a_basis_of_its_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama-tied")
    plain = save_peft(directory, tmp_path / "plain")
    adapter = trained_in(directory, "r1,r4", plain, tmp_path / "adapter")
    compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme="fp32", rotation_seed=4)
    assert EngineFile.open(tmp_path / "e.plan").manifest["rotation"]["seed"] == 4
    assert mean_kl(peft_logits(directory, plain, IDS), engine_logits(tmp_path / "e.plan")) <= 1e-7


def test_what_cannot_leave_its_basis_is_refused_by_both_hashes(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    dims = dimensions(import_model(directory).description)
    for place, (pool, fields) in enumerate([(1, W4), (16, {"adapter_type": "qalora"})]):
        adapter = tmp_path / f"adapter-{place}"
        write_adapter(adapter, random_deltas(directory, pool=pool), basis_of(directory, "r1,r4", **fields))
        with pytest.raises(BasisMismatchError) as error:
            compile_engine(directory, tmp_path / "e.plan", adapter=adapter, rotate="r1,r2")
        for sites in ("r1,r4", "r1,r2"):
            assert Rotation.parse(sites).basis(dims)[:12] in error.value.message
        with pytest.raises(BasisMismatchError, match="none"):
            compile_engine(directory, tmp_path / "e.plan", adapter=adapter, rotate="none")
    assert not list(tmp_path.glob("*.plan*"))


def test_an_adapter_of_another_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    mine, other = tiny_model("llama16"), tiny_model("llama16", rms_norm_eps=1e-5)
    write_adapter(tmp_path / "adapter", random_deltas(mine), basis_of(mine, "r1"))
    with pytest.raises(InputError) as error:
        compile_engine(other, tmp_path / "e.plan", adapter=tmp_path / "adapter")
    assert Checkpoint.open(mine).fingerprint() in error.value.message
    assert Checkpoint.open(other).fingerprint() in error.value.message


def test_dora_does_not_leave_a_basis_that_mixed_its_rows(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    draw = np.random.default_rng(1)
    deltas = {
        name: Delta(delta.a, delta.b, delta.scale, draw.uniform(1, 2, delta.shape[0]))
        for name, delta in random_deltas(directory).items()
    }
    write_adapter(tmp_path / "adapter", deltas, basis_of(directory, "r1,r4", adapter_type="dora"))
    compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", scheme="fp32")
    with pytest.raises(BasisMismatchError, match="DoRA"):
        compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", scheme="fp32", rotate="none")


@pytest.mark.parametrize("merge", ["fold", "branch"])
def test_auto_scores_the_model_that_the_adapter_makes(merge: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = talking(tiny_model("llama16"), tmp_path / "model")
    adapter = save_peft(directory, tmp_path / "adapter", size=0.3)
    merged = save_merged(directory, adapter, tmp_path / "merged")
    options = {"scheme": "w4a4", "embedding_bits": 32, "head_bits": 32}
    found = compile_engine(directory, tmp_path / "e.plan", adapter=adapter, merge=merge, **options).rotation
    expected = compile_engine(merged, tmp_path / "m.plan", **options).rotation
    plain = compile_engine(directory, tmp_path / "p.plan", **options).rotation
    for frame, score in expected["scores"].items():
        assert found["scores"][frame] == pytest.approx(score, rel=1e-3 if merge == "fold" else 0.1)
        assert abs(found["scores"][frame] - plain["scores"][frame]) > 0.02 * score


@pytest.mark.parametrize("name", ["llama16", "llama-tied"])
@pytest.mark.parametrize("sites", ["none", "r1,r2,r4"])
def test_a_head_with_a_part_of_its_own_is_untied(name: str, sites: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name)
    adapter = save_peft(directory, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    options: dict[str, Any] = {"adapter": adapter, "rotate": sites}
    if name == "llama-tied":
        with pytest.raises(UnsupportedModelError) as error:
            compile_engine(directory, tmp_path / "e.plan", **options)
        assert "--tied untie" in error.value.hint
        options["tied"] = "untie"
    compile_engine(directory, tmp_path / "e.plan", scheme="fp32", **options)
    assert mean_kl(peft_logits(directory, adapter, IDS), engine_logits(tmp_path / "e.plan")) <= 1e-7
    report = compile_engine(directory, tmp_path / "e.plan", scheme="w4a16", merge="branch", **options)
    assert "lm_head.weight" in (report.survival or {})
    with EngineFile.open(tmp_path / "e.plan") as file:
        assert not any(name.startswith("lm_head") and "branch" in name for name in file.tensors)


# the grid


def test_an_adapter_brings_its_grid_along(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    write_adapter(tmp_path / "adapter", random_deltas(directory), basis_of(directory, "r4", **W4))
    compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter")
    manifest = EngineFile.open(tmp_path / "e.plan").manifest
    found = {key: manifest[key] for key in ("scheme", "group_size", "symmetric", "clip")}
    assert found == {"scheme": "w4a8", "group_size": 16, "symmetric": False, "clip": "mse"}
    compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", scheme="w4a4", group_size=16)
    assert EngineFile.open(tmp_path / "e.plan").manifest["scheme"] == "w4a4"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"group_size": 32}, ("--group-size 32", "--group-size 16")),
        ({"symmetric": True}, ("--symmetric", "--asymmetric")),
        ({"clip": "none"}, ("--clip none", "--clip mse")),
        ({"scheme": "w8a8"}, ("w8a8", "base of 4")),
        ({"scheme": "fp32"}, ("fp32", "base of 4")),
    ],
)
def test_another_grid_is_refused_by_both_values(
    options: dict[str, Any], named: tuple[str, str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama16")
    write_adapter(tmp_path / "adapter", random_deltas(directory), basis_of(directory, "r4", **W4))
    with pytest.raises(SchemeError) as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", **options)
    assert all(word in error.value.message for word in named)


def test_a_recipe_file_that_names_another_grid_is_refused_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    write_adapter(tmp_path / "adapter", random_deltas(directory), basis_of(directory, "r4", **W4))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('adapter = "adapter"\ngroup-size = 32\n')
    with pytest.raises(SchemeError, match="--group-size 32"):
        compile_engine(directory, tmp_path / "e.plan", recipe=recipe)
    report = compile_engine(directory, tmp_path / "e.plan", recipe=recipe, group_size=16)
    assert report.survival is not None


@pytest.mark.parametrize(
    ("kind", "activations", "scheme"),
    [("w3", 16, "w3a16"), ("w2", 16, "w2a16"), ("w4", 4, "w4a4"), ("float", 4, "w4a4"), ("float", 6, "w6a6")],
)
def test_the_scheme_of_the_training_is_the_default(
    kind: str, activations: int, scheme: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory, lines = tiny_model("llama16"), Lines()
    grid: dict[str, Any] = {"activations": activations}
    if kind != "float":
        grid |= {"grid": Grid(int(kind[1]), 32, True, "none"), "base_kind": kind}
    write_adapter(tmp_path / "adapter", random_deltas(directory), basis_of(directory, "none", **grid))
    compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", progress=lines)
    assert EngineFile.open(tmp_path / "e.plan").manifest["scheme"] == scheme
    assert any(line.startswith(f"scheme {scheme}") for line in lines.lines)


def test_nf4_has_no_engine(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    write_adapter(tmp_path / "adapter", random_deltas(directory), basis_of(directory, "r4", base_kind="nf4"))
    with pytest.raises(SchemeError, match="NF4") as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter")
    assert "--base w4" in error.value.hint
