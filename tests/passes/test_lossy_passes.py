"""The lossy half: grids, kernels' forms, fusions and the whole pipeline on every family, each exact step measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import MODELS, TinyModel

from rqc.compiler.importer import import_model
from rqc.compiler.instruments import EXACT_DRIFT, Instruments, probe_tokens
from rqc.compiler.passlist import passes_of
from rqc.compiler.pipeline import compile_model
from rqc.compiler.probe import drift, run_stage
from rqc.compiler.recipe import Recipe
from rqc.models.rotation import Rotation
from rqc.passes.base import LINEAR, Pass
from rqc.passes.skip_norm import FuseSkipNorm
from rqc.runtime.engine import Engine
from rqc.runtime.errors import PassError


def valid_sites(name: str) -> str:
    return "r2,r3,r4" if name in ("olmo2", "gemma2", "gemma3") else "r1,r2,r3,r4"


def lowered(directory: Path, sites: str, **options: object) -> tuple[ir.Model, Instruments]:
    imported = import_model(directory)
    recipe = Recipe.from_values(options)
    instruments = Instruments(verify_each=True)
    instruments.run(imported.model, passes_of(recipe, imported.description, Rotation.parse(sites)))
    return imported.model, instruments


@pytest.mark.parametrize("name", MODELS)
def test_every_exact_pass_of_the_whole_list_is_exact(name: str, tiny_model: TinyModel) -> None:
    model, instruments = lowered(tiny_model(name), valid_sites(name), scheme="w4a16")
    exact = [record for record in instruments.records if record.exact]
    assert len(exact) >= 7
    assert all(record.drift is not None and record.drift <= EXACT_DRIFT for record in exact)
    lossy = max(record.drift or 0.0 for record in instruments.records if not record.exact)
    assert 1e-4 < lossy < 1.0
    assert not {"Attention", "GroupQueryAttention"} <= {node.op_type for node in model.graph}


GRIDS = [{"group_size": size, "symmetric": symmetric} for size in (16, -1) for symmetric in (True, False)]
ROUNDED = ("w8a16", "w8a8", "w6a6", "w4a8", "w4a4", "w3a16", "w2a16")


@pytest.mark.parametrize(
    ("scheme", "grid"), [("fp32", {}), ("fp16", {}), *((scheme, grid) for scheme in ROUNDED for grid in GRIDS)]
)
def test_every_scheme_lowers(scheme: str, grid: dict[str, Any], tiny_model: TinyModel) -> None:
    model, instruments = lowered(tiny_model("llama-tied"), "r1,r2,r4", scheme=scheme, **grid)
    total = drift(run_stage(import_model(tiny_model("llama-tied")).model, probe_tokens(model)), instruments._logits)  # type: ignore[arg-type]
    limit = {"fp32": 2e-6, "fp16": 2e-3, "w8a16": 0.02, "w8a8": 0.03, "w6a6": 0.2, "w4a8": 0.3, "w3a16": 0.6}.get(
        scheme, 1.5
    )
    assert total < limit
    assert all(record.drift is not None for record in instruments.records)


def test_weights_shared_by_gather_and_head_are_stored_once(tiny_model: TinyModel) -> None:
    for scheme in ("w4a8", "w4a16"):
        model, _ = lowered(tiny_model("llama-tied"), "r1", scheme=scheme)
        keys = [v.const_value.meta.get("rqc.storage") for v in model.graph.initializers.values() if v.const_value]
        shared = {key for key, count in Counter(key for key in keys if key is not None).items() if count == 2}
        assert len(shared) == (1 if scheme == "w4a8" else 2)


def test_projections_are_packed_and_rope_is_inside(tiny_model: TinyModel) -> None:
    model, _ = lowered(tiny_model("llama16"), "r1,r2,r4", scheme="w4a8")
    names = [node.metadata_props[LINEAR] for node in model.graph if LINEAR in node.metadata_props]
    assert any(name.count("+") == 2 for name in names)
    assert any(name.count("+") == 1 for name in names)
    operators = Counter(node.op_type for node in model.graph)
    assert operators["GroupQueryAttention"] == 2
    assert operators["RotaryEmbedding"] == 0
    assert {value.name for value in model.graph.inputs if "past" not in (value.name or "")} == {
        "input_ids",
        "seqlens_k",
        "total_sequence_length",
        "logits_positions",
    }


def test_r3_keeps_rope_outside(tiny_model: TinyModel) -> None:
    model, _ = lowered(tiny_model("llama16"), "r3", scheme="w4a8")
    operators = Counter(node.op_type for node in model.graph)
    assert operators["RotaryEmbedding"] == 4
    assert operators["GroupQueryAttention"] == 2


def test_a_head_size_that_the_kernel_refuses_stays_standard(tiny_model: TinyModel) -> None:
    model, _ = lowered(tiny_model("llama"), "r4", scheme="w4a8")
    assert Counter(node.op_type for node in model.graph)["Attention"] == 2


def test_routers_stay_in_float(tiny_model: TinyModel) -> None:
    model, _ = lowered(tiny_model("mixtral"), "r1,r2,r4", scheme="w4a8")
    routers = [node for node in model.graph if node.metadata_props.get(LINEAR, "").endswith("mlp.gate.weight")]
    assert [node.op_type for node in routers] == ["FusedMatMul"] * 2
    experts = [node for node in model.graph if ".experts." in node.metadata_props.get(LINEAR, "")]
    assert {node.op_type for node in experts} == {"MatMulNBits"}


class _Wrong(Pass):
    """A pass that lies."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
        return ir.passes.PassResult(model, modified=True)


def test_verify_each_names_the_pass_that_lies(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("llama"))
    with pytest.raises(PassError, match="_Wrong"):
        Instruments(verify_each=True).run(imported.model, [FuseSkipNorm(), _Wrong()])


@pytest.mark.parametrize("name", ["llama", "llama16", "mistral", "qwen3-16", "smollm3", "gemma3", "phi3", "qwen3-moe"])
def test_engine_equals_its_graph_beyond_the_window_and_step_by_step(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    recipe = Recipe.from_values({"scheme": "fp32", "rotate": valid_sites(name)})
    path = tmp_path / "engine.plan"
    compile_model(tiny_model(name), path, recipe=recipe)
    ids = np.random.default_rng(1).integers(3, 96, 90)
    expected = run_stage(import_model(tiny_model(name)).model, ids)
    with Engine.load(path) as engine:
        assert drift(expected, engine.logits(ids.tolist())) < 1e-5
        greedy = engine.generate_ids(ids[:50].tolist(), max_new_tokens=12)
    sequence = ids[:50].tolist()
    for token in greedy:
        step = run_stage(import_model(tiny_model(name)).model, sequence)[-1]
        assert int(step.argmax()) == token
        sequence.append(token)
