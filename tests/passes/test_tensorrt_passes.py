"""The lowering to TensorRT, run on ONNX Runtime: each exact pass changes nothing, and without its essential part it
does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from scatter_runs import Cached, exact_steps, on_grid, session, valid_sites
from tiny import MODELS, TinyModel
from tiny_adapters import W4, Lines, basis_of, random_deltas, save_peft

from rqc.compiler.adapters.reading import open_adapter
from rqc.compiler.calibration.blocks import run_parts
from rqc.compiler.importer import import_model
from rqc.compiler.passlist import passes_of
from rqc.compiler.probe import drift, run_stage
from rqc.compiler.recipe import Recipe
from rqc.compiler.targets import guards, tensorrt
from rqc.compiler.targets.settle import settled
from rqc.models.adapter import write_adapter
from rqc.models.grid import Grid
from rqc.passes import scatter_cache
from rqc.passes.base import OFFSET, PADDED
from rqc.passes.cleanup import RemoveDeadParts
from rqc.passes.float_type import CastFloats
from rqc.passes.pack_side_paths import PackSidePaths
from rqc.passes.positions import SelectPositions
from rqc.passes.quantize import QuantizeLinears
from rqc.passes.scatter_cache import ScatterCache
from rqc.passes.store_columns import StoreColumns
from rqc.passes.symmetric_codes import SymmetricCodes
from rqc.runtime.errors import TargetError

EXACT, HALF = 1e-5, 2e-3
"""Relative drift of logits that an exact pass in float32 and a whole lowering in float16 may have."""
TOKENS = np.random.default_rng(0).integers(0, 96, 60)
"""Beyond the windows of all tiny models."""
SHARP = {"query_pre_attn_scalar": 1, "initializer_range": 0.3}
"""Gemma 2's scores as large as its soft cap of 50."""
SCHEMES: list[dict[str, Any]] = [
    {"scheme": "w4a16", "group_size": 32},
    {"scheme": "w4a16", "group_size": 64, "symmetric": False},
    {"scheme": "w4a16", "group_size": 128},
    {"scheme": "w4a16", "group_size": -1, "symmetric": False},
    {"scheme": "w4a16", "group_size": -1, "embedding_bits": 4, "head_bits": 16},
    {"scheme": "w8a16"},
    {"scheme": "w8a16", "symmetric": False},
    {"scheme": "w3a16", "group_size": 32},
    {"scheme": "w3a16", "group_size": 64, "symmetric": False},
    {"scheme": "w2a16", "group_size": 32},
    {"scheme": "w2a16", "group_size": 16, "symmetric": False},
    {"scheme": "fp16"},
    {"scheme": "fp8a16"},
    {"scheme": "nvfp4a16"},
    {"scheme": "nvfp4a16", "clip": "none", "embedding_bits": 4, "head_bits": 16},
]


def lower(name: str, tiny_model: TinyModel, changes: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """(logits of the model on its grid, the model behind all exact passes in float32)."""
    imported, recipe = on_grid(tiny_model(name, **(changes or {})), **options)
    before = run_stage(imported.model, TOKENS, threads=1)
    for step in exact_steps(imported, recipe):
        step(imported.model)
    return before, imported.model


def logits(model: ir.Model) -> Any:
    return Cached(session(model)).read(TOKENS)[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_is_exact_on_every_family_and_changes_nothing_twice(name: str, tiny_model: TinyModel) -> None:
    """Hidden 96 and 152 in blocks of 64: the last ones are filled up."""
    options = {"scheme": "w4a16", "group_size": 64, "symmetric": False, "rotate": valid_sites(name)}
    imported, recipe = on_grid(tiny_model(name), **options)
    model = imported.model
    before = run_stage(model, TOKENS, threads=1)
    for step in exact_steps(imported, recipe):
        assert step(model).modified, step.label
        assert drift(before, run_stage(model, TOKENS, threads=1)) <= EXACT, step.label
        assert not step(model).modified, step.label
    assert drift(before, logits(model)) <= EXACT
    half = CastFloats("fp16")
    assert half(model).modified
    assert not half(model).modified
    assert drift(before, logits(model)) <= HALF
    guards.check_graph(model, recipe.target, recipe.sm)


@pytest.mark.parametrize("options", SCHEMES, ids=lambda options: " ".join(map(str, options.values())))
def test_every_weight_only_scheme_is_lowered_exactly(options: dict[str, Any], tiny_model: TinyModel) -> None:
    before, model = lower("llama-bias", tiny_model, **options)
    assert drift(before, logits(model)) <= EXACT
    CastFloats("fp16")(model)
    assert drift(before, logits(model)) <= HALF
    kinds = {v.dtype for v in model.graph.initializers.values() if not (v.name or "").endswith(".float4.unit")}
    assert ir.DataType.FLOAT not in kinds
    assert not kinds & {ir.DataType.UINT4, ir.DataType.UINT8}
    guards.check_graph(model, "tensorrt-rtx", {"fp8a16": (89,), "nvfp4a16": (120,)}.get(options["scheme"], (80, 86)))


def test_signed_scales_cost_a_correction_and_positive_ones_none(tiny_model: TinyModel) -> None:
    """An adapter that was trained on another grid brings it along."""
    counts = []
    for positive in (True, False):
        imported, recipe = on_grid(tiny_model("llama"), scheme="fp16")
        QuantizeLinears(imported.description, Grid(4, 32, True, "mse", positive))(imported.model)
        before = run_stage(imported.model, TOKENS, threads=1)
        for step in (SymmetricCodes(), StoreColumns(), ScatterCache(), SelectPositions(), RemoveDeadParts()):
            step(imported.model)
        assert drift(before, logits(imported.model)) <= EXACT
        CastFloats("fp16")(imported.model)
        assert drift(before, logits(imported.model)) <= HALF
        counts.append(sum(OFFSET in node.metadata_props for node in imported.model.graph))
        assert recipe.dtype == "fp16"
    assert counts == [0, 14]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "smollm3"])
def test_pieces_and_steps_of_a_batch_give_what_the_whole_gives(name: str, tiny_model: TinyModel) -> None:
    """Two rows of different length, read in two pieces each, then step by step together, beyond the window of 32."""
    imported, recipe = on_grid(tiny_model(name), scheme="w4a16", rotate="r2,r3")
    before = imported.model.clone()
    for step in exact_steps(imported, recipe):
        step(imported.model)
    made, draw = session(imported.model), np.random.default_rng(2)
    rows = [draw.integers(3, 96, count) for count in (50, 39)]
    whole = [run_stage(before, ids, threads=1) for ids in rows]
    steps, caches, found = 6, [], []
    for ids in rows:
        cached, cut = Cached(made), len(ids) // 3
        pieces = [cached.read(ids[:cut]), cached.read(ids[cut:-steps], cut)]
        caches.append(cached)
        found.append(np.concatenate(pieces, axis=1)[0])
    batch = Cached.joined(caches)
    for step in range(steps):
        places = [len(ids) - steps + step for ids in rows]
        ends = batch.read([[ids[place]] for ids, place in zip(rows, places, strict=True)], places)
        found = [np.concatenate([was, now]) for was, now in zip(found, ends, strict=True)]
    for expected, got in zip(whole, found, strict=True):
        assert drift(expected, got) <= EXACT


def test_a_window_and_a_soft_cap_of_one_size_stay_apart(tiny_model: TinyModel) -> None:
    before, model = lower("gemma2", tiny_model, {**SHARP, "sliding_window": 50}, scheme="fp32")
    assert drift(before, logits(model)) <= EXACT
    CastFloats("fp16")(model)
    assert drift(before, logits(model)) <= HALF


@pytest.mark.parametrize("sites", ["r1", "r2", "r3", "r4", "r1,r2,r3,r4"])
def test_rotations_go_along(sites: str, tiny_model: TinyModel) -> None:
    plain, _ = lower("qwen3-16", tiny_model, scheme="fp32")
    before, model = lower("qwen3-16", tiny_model, scheme="fp32", rotate=sites)
    assert drift(plain, before) <= EXACT
    assert drift(before, logits(model)) <= EXACT
    CastFloats("fp16")(model)
    assert drift(before, logits(model)) <= HALF


@pytest.mark.parametrize("scheme", ["w4a16", "fp16", "nvfp4a16"])
@pytest.mark.parametrize("how", ["fold", "branch", "zero-point", "switched"])
def test_adapters_go_along(how: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """In blocks of 16 and of 64, which 152 inputs fill neither of; every switch on."""
    directory = tiny_model("llama-bias")
    options: dict[str, Any] = {"scheme": scheme, "merge": how, "rotate": "r1,r2,r3,r4"}
    options |= {"group_size": 64} if scheme == "w4a16" else {}
    if how == "zero-point":
        if scheme in ("fp16", "nvfp4a16"):
            pytest.skip("floats have no zero points")
        basis = basis_of(directory, "r1,r4", **W4, adapter_type="qalora")
        write_adapter(tmp_path / "pooled", random_deltas(directory, pool=16), basis)
        options = {"scheme": scheme, "adapter": tmp_path / "pooled"}
    elif how == "switched":
        two = {"poet": save_peft(directory, tmp_path / "one"), "clerk": save_peft(directory, tmp_path / "two", seed=1)}
        options |= {"merge": "branch", "adapter": two}
    else:
        options["adapter"] = save_peft(directory, tmp_path / "one")
    imported = import_model(directory)
    recipe = Recipe.from_values({"target": "tensorrt-rtx", **options})
    recipe, merge = open_adapter(recipe, imported, Lines())
    assert merge is not None
    recipe = settled(recipe, imported.description.architecture, merge)
    assert recipe.rotation is not None
    model, before = imported.model, None
    for step in passes_of(recipe, imported.description, recipe.rotation, merge):
        if isinstance(step, SymmetricCodes | PackSidePaths) and before is None:
            before = run_stage(model, TOKENS, threads=1)
        step(model)
        if before is not None and step.exact:
            assert drift(before, run_stage(model, TOKENS, threads=1)) <= EXACT, step.label
    assert before is not None
    gates = [[1, 1]] if how == "switched" else None
    assert drift(before, Cached(session(model)).read(TOKENS, gates=gates)[0]) <= HALF
    guards.check_graph(model, recipe.target, recipe.sm)
    if how == "switched":
        plain = {key: value for key, value in options.items() if key not in ("merge", "adapter")}
        base, _ = lower("llama-bias", tiny_model, **plain)
        assert drift(base, Cached(session(model)).read(TOKENS, gates=[[0, 0]])[0]) <= HALF


def stored(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def replaced(model: ir.Model, name: str, array: Any) -> None:
    model.graph.initializers[name].const_value = ir.Tensor(array, name=name)


def test_without_its_correction_an_asymmetric_grid_is_another_model(tiny_model: TinyModel) -> None:
    before, model = lower("llama", tiny_model, scheme="w4a16", symmetric=False)
    names = [name for name in model.graph.initializers if name.endswith(".left_over")]
    assert len(names) == 14
    replaced(model, names[-1], np.zeros_like(stored(model, names[-1])))
    assert drift(before, logits(model)) > 100 * EXACT


def test_with_one_row_of_scales_swapped_it_is_another_model(tiny_model: TinyModel) -> None:
    before, model = lower("llama", tiny_model, scheme="w4a16", group_size=64)
    name = "model.layers.1.mlp.down_proj.weight.columns.scales"
    scales = stored(model, name).copy()
    assert scales.shape == (3, 96)
    scales[1] = scales[0]
    replaced(model, name, scales)
    assert drift(before, logits(model)) > 100 * EXACT


def test_x_is_filled_up_with_zeros_and_nothing_else(tiny_model: TinyModel) -> None:
    """With zeros as codes anything would do, so that it takes both being wrong to show: which is why codes are held
    against zero too."""
    before, model = lower("llama", tiny_model, scheme="w4a16", group_size=64)
    pads = [node for node in model.graph if PADDED in node.metadata_props]
    assert [node.metadata_props[PADDED] for node in pads] == ["32", "8", "32", "40"] * 2
    codes = stored(model, "model.layers.1.mlp.down_proj.weight.columns")
    assert codes.shape == (192, 96)
    assert not codes[152:].any()
    for node in pads:
        node.replace_input_with(0, node.inputs[0])
    wide = codes.astype(np.int8)
    wide[152:] = 3
    replaced(model, "model.layers.1.mlp.down_proj.weight.columns", wide.astype(ml_dtypes.int4))
    assert drift(before, logits(model)) <= EXACT
    for node in pads[-1:]:
        node.attributes["mode"] = ir.AttrString("mode", "edge")
    assert drift(before, logits(model)) > 100 * EXACT


def test_without_the_pad_the_product_does_not_fit(tiny_model: TinyModel) -> None:
    _, model = lower("llama", tiny_model, scheme="w4a16", group_size=64)
    pad = next(node for node in model.graph if PADDED in node.metadata_props)
    pad.outputs[0].replace_all_uses_with(pad.inputs[0])
    with pytest.raises(Exception, match=r"(?i)dimension|shape"):
        logits(model)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_without_its_window_it_is_another_model(
    name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter_cache, "WINDOW", "rqc.no_such_mark")
    before, model = lower(name, tiny_model, scheme="fp32")
    assert drift(before, logits(model)) > 100 * EXACT


@pytest.mark.parametrize(("kind", "name"), [("Tanh", "gemma2"), ("GreaterOrEqual", "llama")])
def test_without_soft_cap_or_causal_mask_it_is_another_model(kind: str, name: str, tiny_model: TinyModel) -> None:
    before, model = lower(name, tiny_model, SHARP if kind == "Tanh" else {}, scheme="fp32")
    nodes = [node for node in model.graph if node.op_type == kind]
    assert nodes
    for node in nodes:
        if kind == "Tanh":
            node.outputs[0].replace_all_uses_with(node.inputs[0])
        else:
            node.op_type = "LessOrEqual"
    assert drift(before, logits(model)) > 100 * EXACT


def test_what_no_fixed_cache_can_be_made_of_is_refused(tiny_model: TinyModel) -> None:
    imported, recipe = on_grid(tiny_model("llama"), scheme="fp32")
    imported.model.graph.inputs[:] = [v for v in imported.model.graph.inputs if v.name != "position_ids"]
    with pytest.raises(TargetError, match="position_ids"):
        ScatterCache()(imported.model)
    imported, recipe = on_grid(tiny_model("llama"), scheme="fp32")
    attention = next(node for node in imported.model.graph if node.op_type == "Attention")
    attention.replace_input_with(5, None)
    with pytest.raises(TargetError, match="without a cache"):
        ScatterCache()(imported.model)
    assert recipe.target == "tensorrt-rtx"


def test_eight_bits_in_blocks_are_refused(tiny_model: TinyModel) -> None:
    imported, _ = on_grid(tiny_model("llama"), scheme="fp16")
    QuantizeLinears(imported.description, Grid(8, 32, True, "none", True))(imported.model)
    with pytest.raises(TargetError, match="8-bit codes in groups of 32"):
        StoreColumns()(imported.model)


def test_floats_of_half_a_size_are_all_there_are(tiny_model: TinyModel) -> None:
    """Also in bf16, which ONNX Runtime does not compute; logits leave as float32, gates come in as float32."""
    for name, kind in (("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)):
        _, model = lower("gemma2", tiny_model, scheme="w4a16")
        CastFloats(name)(model)
        kinds = Counter(value.dtype for value in model.graph.initializers.values())
        assert not kinds[ir.DataType.FLOAT]
        assert kinds[kind]
        assert {value.dtype for value in model.graph.inputs if "past" in (value.name or "")} == {kind}
        assert {value.dtype for value in model.graph.outputs if "present" in (value.name or "")} == {kind}
        assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
        hidden = stored(model, "rqc.cache.hidden")
        assert np.isfinite(hidden.astype(np.float32))
        assert hidden.astype(np.float32) < -6e4


def test_floats_beyond_half_precision_are_told_of(tiny_model: TinyModel) -> None:
    _, model = lower("llama", tiny_model, scheme="fp32")
    replaced(model, "model.norm.weight", np.full(96, 1e6, np.float32))
    CastFloats("fp16")(model)
    with pytest.raises(TargetError, match=r"model\.norm\.weight has values beyond fp16") as raised:
        stored(model, "model.norm.weight")
    assert "bf16" in raised.value.hint


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gemma3"])
def test_block_by_block_it_is_the_same_model(name: str, tiny_model: TinyModel) -> None:
    """What chooses the frame: heads that read a table through its Transpose, more tokens than are scored at a time."""
    imported, recipe = on_grid(tiny_model(name), scheme="w4a16")
    ids = np.random.default_rng(0).integers(3, 96, 90)
    whole = run_stage(imported.model, ids, threads=1)
    for step in [*tensorrt.packing(recipe, imported.description), *tensorrt.by_blocks(), RemoveDeadParts()]:
        step(imported.model)
    parts = run_parts(imported.model, ids[None], threads=1)
    assert drift(whole, np.concatenate([values["logits"][0] for part, values in parts if part.name == "head"])) <= EXACT
