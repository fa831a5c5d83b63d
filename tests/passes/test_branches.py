"""AddBranches on graphs: what runs is Ŵ + c B A in every form that the graph has on its way; what is left out shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from side_path_models import (
    dense_deltas,
    linear_inputs,
    logits,
    lowered,
    quantized_model,
    steps,
    updated_logits,
    with_magnitudes,
)
from tiny import MODELS, TinyModel

from rqc.compiler.importer import import_model
from rqc.compiler.probe import drift
from rqc.models.grid import Grid
from rqc.passes import pack_side_paths
from rqc.passes.base import BRANCH_A, BRANCH_B
from rqc.passes.branches import AddBranches
from rqc.passes.pack_side_paths import PackSidePaths
from rqc.runtime.errors import InputError, SchemeError, UnsupportedModelError

SAME = 1e-5
W4 = {"scheme": "w4a16", "group_size": 32, "clip": "none"}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_runs_branches(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    imported = import_model(directory)
    deltas = dense_deltas(imported.description)
    expected = updated_logits(directory, deltas, Grid(4, 32))
    assert drift(updated_logits(directory, {}, Grid(4, 32)), expected) > 1e-2
    assert drift(expected, logits(lowered(imported, AddBranches(deltas), **W4))) < SAME


@pytest.mark.parametrize("name", ["llama16", "phi3", "qwen2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dora_scales_the_rows_of_its_base(name: str, symmetric: bool, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    imported = import_model(directory)
    deltas = with_magnitudes(imported, dense_deltas(imported.description))
    expected = updated_logits(directory, deltas, Grid(4, 32, symmetric))
    model = lowered(imported, AddBranches(deltas), **W4, symmetric=symmetric)
    assert drift(expected, logits(model)) < SAME


@pytest.mark.parametrize("scheme", ["fp32", "w8a16", "w2a16"])
def test_floats_planes_and_narrow_codes(scheme: str, tiny_model: TinyModel) -> None:
    directory = tiny_model("llama-bias")
    imported = import_model(directory)
    deltas = dense_deltas(imported.description)
    grid = {"fp32": None, "w8a16": Grid(8, 32), "w2a16": Grid(2, 32)}[scheme]
    expected = updated_logits(directory, deltas, grid)
    merge = AddBranches(deltas)
    options = {"scheme": scheme} if grid is None else {"scheme": scheme, "group_size": 32, "clip": "none"}
    found = steps(imported, merge, **options)
    if grid is None:  # no grids, no projections to pack
        found = [merge, PackSidePaths(), *found]
    for step in found:
        before = logits(imported.model)
        step(imported.model)
        assert not step.exact or drift(before, logits(imported.model)) < SAME, step
    assert drift(expected, logits(imported.model)) < SAME


def test_rotated_models_run_what_was_trained_in_their_basis(tiny_model: TinyModel) -> None:
    """A branch reads the rotated input: its A lives behind the online Hadamard."""
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = dense_deltas(imported.description)
    model = lowered(imported, AddBranches(deltas), "r2,r3,r4", **W4)
    other = quantized_model(directory, Grid(4, 32), "r2,r3,r4")
    AddBranches(deltas)(other.model)
    assert drift(logits(other.model), logits(model)) < SAME


ONLY = [["q_proj", "v_proj"], ["k_proj"], ["v_proj", "k_proj", "up_proj"], ["gate_proj"], ["down_proj", "o_proj"]]


@pytest.mark.parametrize("most_zeros", [0, 384 << 10])
@pytest.mark.parametrize("only", [None, *ONLY])
def test_both_forms_of_b_with_parts_missing(
    only: list[str] | None, most_zeros: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block-diagonal and apart; ranks differ, and the columns of parts without a branch are zeros."""
    monkeypatch.setattr(pack_side_paths, "MOST_ZEROS", most_zeros)
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = dense_deltas(imported.description, only)
    for rank, (name, delta) in enumerate(deltas.items()):
        deltas[name] = replace(delta, a=delta.a[: 1 + rank % 4], b=delta.b[:, : 1 + rank % 4])
    model = lowered(imported, AddBranches(deltas), measured=False, **W4)
    assert drift(updated_logits(directory, deltas, Grid(4, 32)), logits(model)) < SAME
    for node in model.graph:
        if BRANCH_B in node.metadata_props:
            names = node.metadata_props[BRANCH_B].split("+")
            tensor = node.inputs[1].const_value  # type: ignore[union-attr]
            assert tensor is not None
            rows = sum(imported.description.shape(imported.description.by_weight[name])[0] for name in names)
            assert tensor.shape[1] == rows
    operators = Counter(node.op_type for node in model.graph if BRANCH_B in node.metadata_props)
    if only is None:
        assert operators["MatMul"] == 2 * (4 if most_zeros else 7)
        attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        assert all(node.inputs[1] is None for node in attention), "q, k, v go in packed"


@pytest.mark.parametrize("name", ["llama16", "mixtral"])
def test_a_block_pays_one_product_for_each_input(name: str, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model(name))
    model = lowered(imported, AddBranches(dense_deltas(imported.description)), measured=False, **W4)
    found = [node.metadata_props[BRANCH_A].count("+") + 1 for node in model.graph if BRANCH_A in node.metadata_props]
    downs = [1, 1, 2, 3] if name == "llama16" else [1, 1, 1, 1, 1, 3, 8]
    assert sorted(found) == sorted(downs * 2)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w6a6", "w4a4"])
@pytest.mark.parametrize("name", ["llama16", "mixtral"])
def test_branches_read_what_their_linears_read(name: str, scheme: str, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model(name))
    merge = AddBranches(dense_deltas(imported.description))
    model = lowered(imported, merge, "r4", measured=False, scheme=scheme, group_size=32)
    inputs = linear_inputs(model)
    order = {node: index for index, node in enumerate(model.graph)}
    for node in model.graph:
        assert all(order[made] < order[node] for value in node.inputs if value and (made := value.producer()))
        if BRANCH_A in node.metadata_props:
            assert {inputs[name] for name in node.metadata_props[BRANCH_A].split("+")} == {node.inputs[0]}
            assert ("activation" in (node.inputs[0].name or "")) == (scheme in ("w6a6", "w4a4"))  # type: ignore[union-attr]


@pytest.mark.parametrize("mark", [BRANCH_A, BRANCH_B])
def test_what_is_left_out_shows(mark: str, tiny_model: TinyModel) -> None:
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = dense_deltas(imported.description)
    expected = updated_logits(directory, deltas, Grid(4, 32))
    model = lowered(imported, AddBranches(deltas), measured=False, **W4)
    for node in model.graph:
        if mark in node.metadata_props and "down_proj" in node.metadata_props[mark]:
            tensor = node.inputs[1]
            assert tensor is not None
            tensor.const_value = ir.tensor(np.zeros([int(d) for d in tensor.shape or ()], np.float32), name=tensor.name)
    assert drift(expected, logits(model)) > 1e-3


def test_a_dora_whose_scales_stay_behind_shows(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = with_magnitudes(imported, dense_deltas(imported.description))
    expected = updated_logits(directory, deltas, Grid(4, 32))
    monkeypatch.setattr("rqc.models.quantized.magnitude_ratio", lambda magnitude, norms: np.ones(len(norms)))
    assert drift(expected, logits(lowered(imported, AddBranches(deltas), measured=False, **W4))) > 1e-2


def test_the_passes_are_idempotent(tiny_model: TinyModel) -> None:
    imported = quantized_model(tiny_model("llama16"), Grid(4, 32))
    deltas = with_magnitudes(import_model(tiny_model("llama16")), dense_deltas(imported.description))
    assert AddBranches(deltas)(imported.model).modified
    once = logits(imported.model)
    assert not AddBranches(deltas)(imported.model).modified
    assert np.array_equal(once, logits(imported.model))
    for step in steps(imported, None, **W4)[2:]:
        step(imported.model)
        assert type(step).__name__ in ("SelectPositions", "StampOpset") or not step(imported.model).modified


def test_the_same_bytes_again(tiny_model: TinyModel) -> None:
    found = []
    for _ in range(2):
        imported = import_model(tiny_model("qwen3-moe"))
        deltas = dense_deltas(imported.description)
        model = lowered(imported, AddBranches(deltas), measured=False, **W4)
        found.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert found[0] == found[1]


def test_an_untied_head_takes_a_branch_and_a_tied_one_none_with_dora(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("llama16"))
    a, b = np.ones((2, 96)), np.random.default_rng(0).standard_normal((96, 2))
    delta = replace(next(iter(dense_deltas(imported.description).values())), a=a, b=b)
    plain = logits(import_model(tiny_model("llama16")).model)
    AddBranches({"lm_head.weight": delta})(imported.model)
    moved = logits(imported.model)
    assert drift(plain, moved) > 1e-3
    assert moved.shape == plain.shape
    for step in steps(imported, None, scheme="w8a8", group_size=32, head_bits=8):
        step(imported.model)
    assert drift(moved, logits(imported.model)) < 0.1
    tied = quantized_model(tiny_model("llama-tied"), Grid(4, 32))
    for step in steps(tied, None, **{**W4, "embedding_bits": 8, "head_bits": 8})[:2]:
        step(tied.model)
    with pytest.raises(SchemeError, match="embedding and head at once"):
        AddBranches({"lm_head.weight": replace(delta, magnitude=np.ones(96))})(tied.model)


def test_what_does_not_fit_is_refused(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama16")
    imported = quantized_model(directory, Grid(4, 32))
    name, good = next(iter(dense_deltas(imported.description).items()))
    with pytest.raises(UnsupportedModelError, match="no linear of the graph"):
        AddBranches({"model.layers.9.mlp.up_proj.weight": good})(imported.model)
    with pytest.raises(InputError, match="for a weight of"):
        AddBranches({name: good.rows(slice(0, 8))})(imported.model)
    with pytest.raises(InputError, match=r"q_proj.*output row 0 is -1"):
        AddBranches({name: replace(good, magnitude=-np.ones(good.shape[0]))})(imported.model)
    with pytest.raises(SchemeError, match="stored as floats"):
        AddBranches({name: replace(good, magnitude=np.ones(good.shape[0]))})(import_model(directory).model)
    AddBranches({name: good})(imported.model)
    with pytest.raises(SchemeError, match="branch of another adapter"):
        AddBranches({name: replace(good)})(imported.model)
