"""Ways to merge: each computes the adapter on the engine's own grid, is chosen or refused with its reason, and tells
what rounding leaves of the adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyModel
from tiny_adapters import (
    IDS,
    W4,
    Lines,
    basis_of,
    engine_logits,
    on_the_grid,
    peft_logits,
    random_deltas,
    relative,
    save_peft,
    talking,
)

from rqc.compiler.api import compile_engine
from rqc.compiler.cli import main
from rqc.models.adapter import write_adapter
from rqc.models.delta import Delta
from rqc.models.grid import Grid, quantize
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import ParityError, SchemeError
from rqc.runtime.inspection import inspect_engine

FLOAT_TABLES = {"scheme": "w4a16", "embedding_bits": 32, "head_bits": 32}


def with_magnitudes(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The same as DoRA, magnitudes drawn."""
    draw = np.random.default_rng(1)
    return {name: replace(delta, magnitude=draw.uniform(0.2, 0.4, delta.shape[0])) for name, delta in deltas.items()}


@pytest.mark.parametrize("name", ["llama16", "phi3", "qwen2", "llama-tied"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize(("kind", "pool", "way"), [("qalora", 16, "zero-point"), ("lora", 1, "branch")])
def test_an_adapter_of_a_quantized_base_runs_on_that_base(
    name: str, dora: bool, kind: str, pool: int, way: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name)
    deltas = random_deltas(directory, pool=pool)
    deltas = with_magnitudes(deltas) if dora else deltas
    write_adapter(tmp_path / "adapter", deltas, basis_of(directory, "r1,r4", **W4, adapter_type=kind))
    report = compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", **FLOAT_TABLES)
    manifest = EngineFile.open(tmp_path / "e.plan").manifest
    assert manifest["adapter"]["merge"] == way
    assert relative(engine_logits(tmp_path / "e.plan"), on_the_grid(directory, "r1,r4", deltas)) <= 1e-4
    assert relative(engine_logits(tmp_path / "e.plan"), on_the_grid(directory, "r1,r4", {})) > 1e-2
    assert report.survival == dict.fromkeys(deltas, 1.0)


def test_a_grid_of_activations_is_judged_by_the_scheme_that_the_adapter_brings(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory, fine, coarse = tiny_model("llama16"), tmp_path / "fine", tmp_path / "coarse"
    write_adapter(coarse, random_deltas(directory), basis_of(directory, "r1,r4", **W4, activations=4))
    write_adapter(fine, random_deltas(directory), basis_of(directory, "r1,r4", **W4))
    clipped: dict[str, Any] = {"activation_clip": 0.9, "activation_symmetric": False}
    compile_engine(directory, tmp_path / "e.plan", adapter=coarse, **clipped)
    with EngineFile.open(tmp_path / "e.plan") as engine:
        assert engine.manifest["scheme"] == "w4a4"
    for adapter, scheme in ((fine, None), (coarse, "w4a8")):
        with pytest.raises(SchemeError, match="--activation-asymmetric with --scheme"):
            compile_engine(directory, tmp_path / "e.plan", adapter=adapter, scheme=scheme, **clipped)


def test_a_router_takes_its_part_in_floats(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("qwen3-moe")
    deltas = random_deltas(directory, routers=True)
    write_adapter(tmp_path / "adapter", deltas, basis_of(directory, "r1,r4", **W4))
    report = compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", **FLOAT_TABLES)
    assert [item.name for item in report.passes if item.name in ("FoldAdapter", "AddBranches")] == [
        *("FoldAdapter", "AddBranches")
    ]
    assert relative(engine_logits(tmp_path / "e.plan"), on_the_grid(directory, "r1,r4", deltas)) <= 1e-4
    assert set(report.survival or {}) == set(deltas)


def test_loftq_subtracts_its_residual_before_the_grid(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    deltas = random_deltas(directory)
    residual = {n: replace(delta, scale=1.0) for n, delta in random_deltas(directory, rank=2, size=0.05).items()}
    basis = basis_of(directory, "r1,r2,r4", **W4, residual=True)
    write_adapter(tmp_path / "adapter", deltas, basis, residual=residual)
    report = compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", **FLOAT_TABLES)
    expected = on_the_grid(directory, "r1,r2,r4", deltas, residual)
    assert relative(engine_logits(tmp_path / "e.plan"), expected) <= 1e-4
    assert relative(engine_logits(tmp_path / "e.plan"), on_the_grid(directory, "r1,r2,r4", deltas)) > 1e-3
    assert [item.detail[0] for item in report.passes if item.name == "FoldAdapter"] == ["−"]
    with pytest.raises(SchemeError, match="LoftQ") as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", merge="fold")
    assert "--merge branch" in error.value.hint


@pytest.mark.parametrize("sites", ["none", "r1,r2,r4"])
def test_a_plain_adapter_runs_beside_a_rotated_grid(sites: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapter = save_peft(directory, tmp_path / "adapter")
    options = {"scheme": "fp32", "rotate": sites}
    compile_engine(directory, tmp_path / "e.plan", adapter=adapter, merge="branch", **options)
    assert relative(engine_logits(tmp_path / "e.plan"), peft_logits(directory, adapter, IDS)) <= 1e-5
    for scheme in ("w4a16", "w8a8", "w4a4", "fp16"):
        report = compile_engine(
            directory, tmp_path / "q.plan", adapter=adapter, merge="branch", scheme=scheme, rotate=sites
        )
        assert min((report.survival or {}).values()) == 1.0


def test_dora_beside_rotated_outputs_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapter = save_peft(directory, tmp_path / "adapter", use_dora=True)
    options = {"adapter": adapter, "merge": "branch", "scheme": "w4a16"}
    for rotate in ("r1,r4", "auto"):
        with pytest.raises(SchemeError, match="DoRA") as error:
            compile_engine(directory, tmp_path / "e.plan", rotate=rotate, **options)
        assert "--merge fold" in error.value.hint
    with pytest.raises(SchemeError, match="fp32"):
        compile_engine(directory, tmp_path / "e.plan", rotate="none", **{**options, "scheme": "fp32"})
    compile_engine(directory, tmp_path / "e.plan", rotate="none", **options)


def test_zero_points_take_pooled_adapters_only(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    dense, pooled = tmp_path / "dense", tmp_path / "pooled"
    write_adapter(dense, random_deltas(directory), basis_of(directory, "r4", **W4))
    with pytest.raises(SchemeError, match="blocks of 16 inputs") as error:
        compile_engine(directory, tmp_path / "e.plan", adapter=dense, merge="zero-point")
    assert "--merge branch" in error.value.hint
    write_adapter(pooled, random_deltas(directory, pool=32), None)
    options: dict[str, Any] = {"adapter": pooled, "merge": "zero-point"}
    with pytest.raises(SchemeError, match="rotated"):
        compile_engine(directory, tmp_path / "e.plan", rotate="r1", **options)
    with pytest.raises(SchemeError, match="blocks of 64"):
        compile_engine(directory, tmp_path / "e.plan", rotate="none", group_size=64, **options)
    with pytest.raises(SchemeError, match="no zero points"):
        compile_engine(directory, tmp_path / "e.plan", rotate="none", scheme="fp16", **options)
    for symmetric in (True, False):
        report = compile_engine(directory, tmp_path / "e.plan", rotate="none", symmetric=symmetric, **options)
        assert min((report.survival or {}).values()) == 1.0


def test_zero_points_leave_codes_and_scales_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("qwen3-16")
    write_adapter(
        tmp_path / "adapter",
        random_deltas(directory, pool=16),
        basis_of(directory, "r1,r4", **W4, adapter_type="qalora"),
    )
    compile_engine(directory, tmp_path / "merged.plan", adapter=tmp_path / "adapter")
    grid = {"group_size": 16, "symmetric": False}
    compile_engine(directory, tmp_path / "plain.plan", rotate="r1,r4", **grid)
    merged, plain = (EngineFile.open(tmp_path / f"{name}.plan") for name in ("merged", "plain"))
    stored = [name for name in plain.tensors if name.endswith((".packed", ".packed_scales"))]
    assert len(stored) > 10
    for name in stored:
        np.testing.assert_array_equal(merged.tensor(name), plain.tensor(name))


# what is left of it


def on_grid_model(tiny_model: TinyModel, target: Path) -> Path:
    """A model whose weights lie on the 4-bit grid that engines have: what a dequantized checkpoint is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama16"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            rounded = quantize(parameter.detach().numpy(), Grid(4, 32, False, "none")).dequantize()
            parameter.data = torch.from_numpy(rounded)
    model.save_pretrained(target)
    return target


ON_GRID = {"symmetric": False, "group_size": 32, "rotate": "none", "clip": "none", "scheme": "w4a16"}


def test_a_small_adapter_is_not_rounded_away_in_silence(tiny_model: TinyModel, tmp_path: Path) -> None:
    small = {"size": 0.002}
    on_grid = on_grid_model(tiny_model, tmp_path / "model")
    adapter = save_peft(on_grid, tmp_path / "adapter", **small)
    with pytest.raises(ParityError, match=r"less than 0.5 of the adapter in 14 of 14 linears") as error:
        compile_engine(on_grid, tmp_path / "e.plan", adapter=adapter, **ON_GRID)
    assert error.value.exit_code == 1
    assert "--merge branch" in error.value.hint
    assert not list(tmp_path.glob("*.plan*"))
    least = float(re.search(r"--min-survival (\S+)", error.value.hint)[1])  # type: ignore[index]
    known = compile_engine(on_grid, tmp_path / "e.plan", adapter=adapter, min_survival=least, **ON_GRID)
    assert max((known.survival or {}).values()) < 0.1
    kept = compile_engine(on_grid, tmp_path / "e.plan", adapter=adapter, merge="branch", **ON_GRID)
    assert min((kept.survival or {}).values()) == 1.0
    off_grid = tiny_model("llama16")
    adapter = save_peft(off_grid, tmp_path / "other", **small)
    report = compile_engine(off_grid, tmp_path / "e.plan", adapter=adapter, **ON_GRID)
    assert min((report.survival or {}).values()) > 0.5


def test_survival_is_the_share_along_the_update(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    deltas = random_deltas(directory, size=0.01)
    write_adapter(tmp_path / "adapter", deltas, None)
    report = compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", rotate="none")
    reference, grid = Reference.load(directory), Grid(4, 32, True, "mse")
    for name, delta in deltas.items():
        weight, added = reference.parts[name].weight.double().numpy(), delta.dense()
        kept = (quantize(weight + added, grid).dequantize() - quantize(weight, grid).dequantize()).astype(np.float64)
        assert (report.survival or {})[name] == pytest.approx((kept * added).sum() / (added**2).sum(), abs=1e-4)


def test_many_rows_are_measured_in_part(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16", intermediate_size=3000, num_hidden_layers=1)
    adapter = save_peft(directory, tmp_path / "adapter", size=0.01)
    for sites in ("none", "r1,r2,r4"):
        report = compile_engine(directory, tmp_path / "e.plan", adapter=adapter, rotate=sites)
        measured = (report.survival or {})["model.layers.0.mlp.up_proj.weight"]
        assert 0.5 < measured < 1.5
        weight = Reference.load(directory)
        weight.fold(Rotation.parse(sites), tied=False)
    assert set(report.survival or {}) == {
        f"model.layers.0.{path}.weight"
        for path in (*(f"self_attn.{k}_proj" for k in "qkvo"), *(f"mlp.{k}_proj" for k in ("gate", "up", "down")))
    }


def test_an_adapter_that_adds_nothing_loses_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapter = save_peft(directory, tmp_path / "adapter", size=0.0)
    for merge in ("fold", "branch"):
        report = compile_engine(directory, tmp_path / "e.plan", adapter=adapter, merge=merge)
        assert set((report.survival or {}).values()) == {1.0}


# reports


def test_engine_report_and_inspect_tell_of_the_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapter = save_peft(directory, tmp_path / "adapter", use_rslora=True)
    report = compile_engine(directory, tmp_path / "e.plan", adapter=adapter).to_json()
    record = inspect_engine(tmp_path / "e.plan").to_json()["adapter"]
    assert (record["kind"], record["merge"]) == ("lora", "fold")
    assert record["survival"] == min(report["survival"].values())
    assert record["modules"] == sorted(
        [*(f"self_attn.{k}_proj" for k in "qkvo"), *(f"mlp.{k}_proj" for k in ("gate", "up", "down"))]
    )
    assert "lora, folded into the weights" in inspect_engine(tmp_path / "e.plan").to_text()
    stored = json.loads(EngineFile.open(tmp_path / "e.plan").read("report.json"))
    assert stored["survival"] == report["survival"]
    assert str(tmp_path) not in json.dumps(stored)


def test_the_command_prints_the_linears_with_least(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_model("llama16")
    adapter = save_peft(directory, tmp_path / "adapter")
    arguments = ["compile", str(directory), "-o", str(tmp_path / "e.plan"), "--adapter", str(adapter)]
    assert main([*arguments, "--merge", "fold", "--rotate", "none"]) == 0
    out = capsys.readouterr().out
    assert "of the adapter in 14 linears; least:" in out
    assert sum("model.layers." in line for line in out.splitlines()) == 5
    assert main([*arguments, "--min-survival", "1", "--scheme", "w2a16", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ParityError"
    assert main([*arguments, "--merge", "glue"]) == 2


def test_same_adapter_same_bytes_wherever_it_lies(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    adapter = save_peft(directory, tmp_path / "adapter")
    moved = tmp_path / "elsewhere"
    for merge in ("fold", "branch"):
        first = compile_engine(directory, tmp_path / "a.plan", adapter=adapter, merge=merge, rotate="r1,r4")
        adapter = adapter.rename(moved if adapter != moved else tmp_path / "adapter")
        second = compile_engine(directory, tmp_path / "b.plan", adapter=adapter, merge=merge, rotate="r1,r4")
        assert first.sha256 == second.sha256
    other = save_peft(directory, tmp_path / "third", seed=1)
    assert compile_engine(directory, tmp_path / "c.plan", adapter=other, rotate="r1,r4").sha256 != first.sha256


@pytest.mark.parametrize("merge", ["fold", "branch"])
def test_instruments_and_dry_runs_take_adapters(merge: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, lines = tiny_model("phi3"), Lines()
    adapter = save_peft(directory, tmp_path / "adapter", size=0.2)
    options: dict[str, Any] = {"adapter": adapter, "merge": merge, "rotate": "r1,r2,r4", "scheme": "w4a16"}
    report = compile_engine(directory, tmp_path / "e.plan", verify_each=True, progress=lines, **options)
    step = next(item for item in report.passes if item.name in ("FoldAdapter", "AddBranches"))
    assert not step.exact
    assert step.drift is not None
    assert step.drift > 1e-3
    dry = compile_engine(directory, None, dry_run=True, **options)
    assert dry.survival is None
    assert [item.name for item in dry.passes] == [item.name for item in report.passes]
    assert dry.estimate is not None
    assert abs(dry.estimate.size_bytes - report.size_bytes) < 300_000
    assert any(line.startswith(f"adapter: lora, 12 linears, merged by {merge}") for line in lines.lines)


WAYS = [(1, "fold"), (1, "branch"), (16, "zero-point")]


@pytest.mark.parametrize(
    ("scheme", "pool", "way"),
    [("fp32", *WAYS[0]), ("fp32", *WAYS[1]), *((scheme, *way) for scheme in ("w4a16", "w4a8") for way in WAYS)],
)
def test_verify_afterwards_knows_the_adapter(
    scheme: str, pool: int, way: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = talking(tiny_model("llama16"), tmp_path / "model")
    fields = {"adapter_type": "qalora"} if pool > 1 else {}
    write_adapter(tmp_path / "adapter", random_deltas(directory, pool=pool), basis_of(directory, "r1,r4", **fields))
    grid = {} if scheme == "fp32" else {"group_size": 16}
    options = {"adapter": tmp_path / "adapter", "merge": way, "scheme": scheme, **grid}
    report = compile_engine(directory, tmp_path / "e.plan", verify=True, **options)
    assert report.parity is not None
    assert report.parity["passed"], report.parity


def test_merge_and_survival_need_an_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    for option in (["--merge", "fold"], ["--min-survival", "0.9"]):
        assert main(["compile", str(tiny_model("llama16")), "-o", str(tmp_path / "e.plan"), *option]) == 2
