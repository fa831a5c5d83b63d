"""Bits per layer in an engine: by rule, and by a budget that the calibration text fills."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyModel, give_voice
from tiny_adapters import W4, basis_of, checked, random_deltas, save_peft

from rqc.compiler.api import compile_engine
from rqc.compiler.calibration.blocks import run_parts
from rqc.compiler.calibration.knapsack import Item, choose_widths
from rqc.compiler.calibration.layer_widths import with_widths
from rqc.compiler.calibration.sensitivity import sensitivities, units_of
from rqc.compiler.importer import import_model
from rqc.compiler.recipe import Recipe
from rqc.compiler.reports import compile_text
from rqc.compiler.verify.engine import verify_engine
from rqc.models.adapter import write_adapter
from rqc.models.grid import Grid
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, ResourceError, RqcError, SchemeError
from rqc.runtime.inspection import inspect_engine

IDS = np.random.Generator(np.random.PCG64(5)).integers(0, 96, 96).tolist()
MIXED = [
    {"match": "*.down_proj", "bits": 8},
    {"match": "layers.0.*.[qkv]_proj", "bits": 2},
    {"match": "layers.1.*.k_proj", "bits": 3},
    {"match": "*.o_proj", "bits": 6},
]


def widths_in(engine: Path) -> dict[str, int]:
    """Bits of every linear of the blocks by its own name, those that are packed together too."""
    with EngineFile.open(engine) as file:
        rows = [row for row in file.manifest["layers"] if "layers." in row["name"] and "storage_bits" in row]
    return {name: row["bits"] for row in rows for name in row["name"].split("+")}


def verified(engine: Path, directory: Path) -> bool:
    report = verify_engine(engine, directory, token_ids=IDS, tokens=96, window=48, threads=1)
    assert report.passed, [gate for gate in report.gates if not gate.passed]
    return report.passed


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w4a16", "rotate": "r1,r2,r4"},
        {"scheme": "w4a8", "rotate": "none", "symmetric": False},
        {"scheme": "w4a8", "rotate": "none", "group_size": 128},
        {"scheme": "w6a6", "rotate": "r1,r4", "group_size": -1},
        {"scheme": "w4a8", "target": "tensorrt-rtx", "portable": True, "group_size": -1, "rotate": "r4"},
    ],
)
def test_rules_give_linears_their_widths_and_the_engine_agrees_with_pytorch(
    options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory, engine = tiny_model("llama16", initializer_range=0.1), tmp_path / "engine.plan"
    compile_engine(directory, engine, layers=MIXED, **options)
    default = int(options["scheme"][1])
    widths = widths_in(engine)
    assert len(widths) == 14
    for name, bits in widths.items():
        wanted = {"down_proj": 8, "o_proj": 6}.get(name.split(".")[-2], default)
        wanted = 2 if name.startswith("model.layers.0.self_attn") and "o_proj" not in name else wanted
        assert bits == (3 if name == "model.layers.1.self_attn.k_proj.weight" else wanted), name
    assert verified(engine, directory)


def test_only_projections_of_one_width_are_packed(tiny_model: TinyModel, tmp_path: Path) -> None:
    engine = tmp_path / "engine.plan"
    compile_engine(tiny_model("llama16"), engine, layers=MIXED, scheme="w4a16", rotate="none")
    with EngineFile.open(engine) as file:
        names = [row["name"] for row in file.manifest["layers"]]
    packed = "+".join(f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv")
    assert [name for name in names if "q_proj" in name] == [packed, "model.layers.1.self_attn.q_proj.weight"]
    assert sum("gate_proj" in name and "up_proj" in name for name in names) == 2


def test_inspect_says_how_many_have_which_width(tiny_model: TinyModel, tmp_path: Path) -> None:
    engine, uniform = tmp_path / "engine.plan", tmp_path / "uniform.plan"
    directory = tiny_model("llama16")
    compile_engine(directory, engine, layers=MIXED, scheme="w4a16", rotate="none")
    compile_engine(directory, uniform, scheme="w4a16", rotate="none")
    text = inspect_engine(engine).to_text()
    widths = widths_in(engine)
    description = import_model(directory).description
    sizes = {name: prod(description.shape(description.by_weight[name])) for name in widths}
    mean = sum(sizes[name] * bits for name, bits in widths.items()) / sum(sizes.values())
    assert f"3 of 2 bits, 1 of 3 bits, 6 of 4 bits, 2 of 6 bits, 2 of 8 bits: {mean:.3f} bits on average" in text
    assert "3-bit weights are stored in 4 bits" in text
    assert "on average" not in inspect_engine(uniform).to_text()


def test_fitted_codes_have_the_widths_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, engine = give_voice(tiny_model("llama16")), tmp_path / "engine.plan"
    compile_engine(directory, engine, layers=MIXED, scheme="w4a16", rotate="none", method="gptq", calibration_samples=4)
    assert sorted(set(widths_in(engine).values())) == [2, 3, 4, 6, 8]
    assert verified(engine, directory)


@pytest.fixture
def talking_model(tiny_model: TinyModel) -> Path:
    """A tiny model with a tokenizer, three layers deep."""
    return give_voice(tiny_model("llama16", num_hidden_layers=3, initializer_range=0.1))


def test_a_budget_is_kept_and_reported(talking_model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine.plan"
    rules = [{"match": "layers.1.*.down_proj", "bits": 3}]
    report = compile_engine(
        talking_model,
        engine,
        scheme="w4a8",
        bits_budget=3.3,
        layers=rules,
        group_size=64,
        calibration_samples=1,
        calibration_length=96,
    )
    found = report.to_json()["widths"]
    with EngineFile.open(engine) as file:
        stored = json.loads(file.read("report.json"))
    assert stored["widths"] == json.loads(json.dumps(found))
    assert stored["recipe"]["bits_budget"] == 3.3
    assert "1 linears of 3 bits" in compile_text(report.to_json())
    assert 2.8 < found["average_bits"] <= 3.3
    widths = widths_in(engine)
    assert widths["model.layers.1.mlp.down_proj.weight"] == 3
    assert len(set(widths.values()) & {2, 4, 8}) >= 2
    assert len(found["units"]) == 11
    description = import_model(talking_model).description
    sizes = {claim.weight: prod(description.shape(claim)) for claim in description.claims}
    ruled = "model.layers.1.mlp.down_proj.weight"
    units = units_of(description, [claim for claim in description.claims if claim.weight != ruled])
    items = [Item(one.size, {int(b): e for b, e in found["units"][one.name]["errors"].items()}) for one in units]
    best = choose_widths(items, int(3.3 * sum(sizes.values())) - 3 * sizes[ruled])
    assert [found["units"][one.name]["bits"] for one in units] == best, "the least sum of the reported errors"
    for name, unit in found["units"].items():
        errors = [unit["errors"][bits] for bits in ("2", "4", "8")]
        assert errors == sorted(errors, reverse=True), name
        if name.endswith("q+k+v"):
            assert {widths[f"model.{name[:9]}self_attn.{kind}_proj.weight"] for kind in "qkv"} == {unit["bits"]}
    assert verified(engine, talking_model)


def test_a_dry_run_spreads_the_budget_evenly(talking_model: Path) -> None:
    report = compile_engine(talking_model, None, scheme="w4a16", bits_budget=3, dry_run=True).to_json()
    assert 2.7 < report["widths"]["average_bits"] <= 3
    assert "units" not in report["widths"]
    detail = next(item["detail"] for item in report["passes"] if item["name"] == "QuantizeLinears")
    assert "of 2 bit" in detail


@pytest.mark.parametrize("budget", [2, 2.5, 3.7, 4, 5, 8])
def test_widths_without_measurement_come_close_to_any_budget(budget: float, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("mixtral"))
    recipe = with_widths(Recipe.from_values({"scheme": "w4a16", "bits_budget": budget}), imported)
    sizes = {claim.weight: prod(imported.description.shape(claim)) for claim in imported.description.claims}
    found = sum(sizes[name] * bits for name, bits in recipe.widths.items())
    assert budget - 1.5 < found / sum(sizes[name] for name in recipe.widths) <= budget + 1e-9
    assert not any("mlp.gate." in name for name in recipe.widths)


def test_sensitivity_is_what_rounding_one_part_does_to_its_block(talking_model: Path) -> None:
    """Against the graph of the whole model with that part on its grid."""
    imported = import_model(talking_model)
    units = units_of(imported.description, [claim for claim in imported.description.claims if claim.quantized])
    ids = np.asarray([IDS[:40], IDS[40:80]], np.int64)
    grid = Grid(2, 32)
    found = sensitivities(imported.model, units, lambda bits: Grid(bits, 32), [2], ids)
    plain = outputs_of(import_model(talking_model).model, ids)
    for unit in (units[0], units[6], units[-1]):
        fresh = import_model(talking_model)
        fresh.description.__dict__["claims"] = tuple(
            claim for claim in fresh.description.claims if claim.weight in unit.weights
        )
        QuantizeLinears(fresh.description, grid)(fresh.model)
        moved = outputs_of(fresh.model, ids)[unit.layer]
        change = ((moved - plain[unit.layer]) ** 2).sum(-1) / (plain[unit.layer] ** 2).sum(-1)
        assert found[unit.name][2] == pytest.approx(float(change.mean()), rel=6e-3)


def outputs_of(model: Any, ids: np.ndarray) -> dict[int, np.ndarray]:
    """What each block gives on, by layer: what the block behind it reads of floats [batch, sequence, hidden]."""
    found: dict[int, np.ndarray] = {}
    before: Mapping[str, Any] = {}
    for part, values in run_parts(model, ids):
        if part.name.startswith("layer"):
            made = [values[name] for name in part.outputs if name not in before and values[name].ndim == 3]
            found[int(part.name.split()[1])] = np.asarray(made[0], np.float64)
        before = values
    return found


@pytest.mark.parametrize(
    ("options", "error", "said", "hinted"),
    [
        ({"layers": [{"match": "layers.9.*", "bits": 2}]}, InputError, "layers.9", "from 0 to 2"),
        ({"bits_budget": 1.5, "scheme": "w4a16"}, SchemeError, "1.5", "from 2 to 8"),
        ({"bits_budget": 9, "scheme": "w4a16"}, SchemeError, "9", "from 2 to 8"),
        (
            {"bits_budget": 2.5, "scheme": "w4a16", "layers": [{"match": "*.mlp.*", "bits": 8}]},
            SchemeError,
            "at least",
            "--bits-budget",
        ),
        ({"bits_budget": 3, "group_size": 256}, SchemeError, "blocks of 256", "64 or 128"),
        ({"bits_budget": 3, "group_size": 16}, SchemeError, "blocks of 16", "64 or 128"),
        ({"layers": [{"match": "*.up_proj", "bits": 2}], "group_size": 256}, SchemeError, "up_proj", "w4a16"),
        ({"bits_budget": 5, "target": "tensorrt-rtx", "portable": True}, SchemeError, "group-size 32", "-1"),
        (
            {"bits_budget": 3, "target": "tensorrt-rtx", "portable": True, "group_size": -1},
            SchemeError,
            "4, 8",
            "4 to 8",
        ),
        (
            {"layers": [{"match": "*.up_proj", "bits": 8}], "target": "tensorrt-rtx", "portable": True},
            SchemeError,
            "one scale per channel",
            "at most 4",
        ),
        (
            {
                "layers": [{"match": "*.up_proj", "bits": 4}],
                "scheme": "w8a8",
                "target": "tensorrt-rtx",
                "portable": True,
            },
            SchemeError,
            "static",
            "w8a16",
        ),
        ({"bits_budget": 3, "scheme": "w4a16", "max_memory": "1MiB"}, ResourceError, "sensitive", "[[layers]]"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options: dict[str, Any], error: type[RqcError], said: str, hinted: str, talking_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        compile_engine(talking_model, tmp_path / "engine.plan", **{"rotate": "none", **options})
    assert said in caught.value.message
    assert hinted in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merge", ["fold", "branch"])
def test_an_adapter_goes_with_rules(merge: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16", initializer_range=0.1)
    adapter = save_peft(directory, tmp_path / "adapter")
    options = {"scheme": "w4a8", "rotate": "r1,r4", "layers": MIXED, "merge": merge}
    assert checked(directory, adapter, tmp_path, **options).passed
    assert set(widths_in(tmp_path / "e.plan").values()) == {2, 3, 4, 6, 8}


@pytest.mark.parametrize("option", [{"bits_budget": 3}, {"layers": [{"match": "*.down_proj", "bits": 8}]}])
def test_an_adapter_that_was_trained_on_a_grid_keeps_its_widths(
    option: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model("llama16")
    write_adapter(tmp_path / "adapter", random_deltas(directory), basis_of(directory, "r4", **W4))
    with pytest.raises(SchemeError, match="trained on a base of 4 bits"):
        compile_engine(directory, tmp_path / "e.plan", adapter=tmp_path / "adapter", **option)


def test_a_budget_needs_a_tokenizer(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json") as caught:
        compile_engine(tiny_model("llama16"), tmp_path / "e.plan", scheme="w4a16", rotate="none", bits_budget=3)
    assert "[[layers]]" in caught.value.hint
