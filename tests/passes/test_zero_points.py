"""MergeZeroPoints on graphs: what runs is Ŵ + ΔW in every form that the graph has; what is left out shows."""

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
    pooled_deltas,
    quantized_model,
    steps,
    updated_logits,
    with_magnitudes,
)
from tiny import MODELS, TinyModel
from zero_point_proofs import certify

from rqc.compiler.importer import import_model
from rqc.compiler.probe import drift
from rqc.models import quantized as lazy_quantized
from rqc.models.grid import Grid
from rqc.passes.base import LINEAR, OFFSET, SUMS
from rqc.passes.branches import AddBranches
from rqc.passes.pack import PackBlocks
from rqc.passes.quantize import quantized_of
from rqc.passes.zero_points import MergeZeroPoints
from rqc.runtime.errors import InputError, SchemeError, UnsupportedModelError

MERGED = 1e-5
"""Relative drift of logits at float accumulation."""


@pytest.mark.parametrize("name", MODELS)
def test_every_family_merges_and_lowers(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    imported = import_model(directory)
    deltas = pooled_deltas(imported.description, 32)
    expected = updated_logits(directory, deltas, Grid(4, 32))
    assert drift(updated_logits(directory, {}, Grid(4, 32)), expected) > 1e-2
    model = lowered(imported, MergeZeroPoints(deltas), scheme="w4a16", group_size=32, clip="none")
    assert drift(expected, logits(model)) < MERGED
    assert {node.op_type for node in model.graph if LINEAR in node.metadata_props} >= {"MatMulNBits"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 16), (4, 128), (4, -1), (8, 32)])
def test_every_grid_merges(bits: int, group: int, symmetric: bool, tiny_model: TinyModel) -> None:
    """The unmerged graph, merged and packed: one function, and the weights' codes and scales as they were."""
    directory, grid = tiny_model("llama-bias"), Grid(bits, group, symmetric)
    imported = quantized_model(directory, grid)
    deltas = pooled_deltas(imported.description, 128 if group == -1 else group)
    if group == -1:  # one row is one group in storage of several blocks: any multiple of them will do
        deltas = {n: replace(d, a=np.broadcast_to(d.a[:, :1], d.a.shape).copy()) for n, d in deltas.items()}
    before = {name: quantized_of(imported.model.graph.initializers[f"{name}.codes"]).get() for name in deltas}  # type: ignore[union-attr]
    AddBranches(deltas)(imported.model)
    unmerged = logits(imported.model)
    merged = quantized_model(directory, grid)
    MergeZeroPoints(deltas)(merged.model)
    assert drift(unmerged, logits(merged.model)) < MERGED
    assert drift(updated_logits(directory, deltas, grid), logits(merged.model)) < MERGED
    PackBlocks()(merged.model)
    assert drift(unmerged, logits(merged.model)) < MERGED
    for name, was in before.items():
        value = merged.model.graph.initializers[f"{name}.packed"]
        now = quantized_of(value)
        assert now is not None
        assert value.const_value is not None
        assert value.const_value.numpy().tobytes() == was.packed_codes().tobytes()
        assert now.get().scales.tobytes() == was.scales.tobytes()
        offset = (deltas[name].scale * deltas[name].b) @ deltas[name].a[:, :: now.block]
        assert certify(was, now.get(), now.adapted().correction, offset).sound


@pytest.mark.parametrize("name", ["llama16", "qwen2", "gemma"])
def test_a_pooled_dora_merges(name: str, tiny_model: TinyModel) -> None:
    directory, grid = tiny_model(name), Grid(4, 32, False)
    imported = import_model(directory)
    deltas = with_magnitudes(imported, pooled_deltas(imported.description, 32))
    expected = updated_logits(directory, deltas, grid)
    options = {"scheme": "w4a16", "group_size": 32, "symmetric": False, "clip": "none"}
    model = lowered(imported, MergeZeroPoints(deltas), **options)
    assert drift(expected, logits(model)) < MERGED


def test_rotated_models_merge_what_was_trained_in_their_basis(tiny_model: TinyModel) -> None:
    """The block sums are those of the rotated input, behind the online Hadamard."""
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = pooled_deltas(imported.description, 32)
    model = lowered(imported, MergeZeroPoints(deltas), "r2,r3,r4", scheme="w4a16", group_size=32, clip="none")
    other = quantized_model(directory, Grid(4, 32), "r2,r3,r4")
    AddBranches(deltas)(other.model)
    assert drift(logits(other.model), logits(model)) < MERGED


@pytest.mark.parametrize("name", ["llama16", "llama-bias"])
def test_block_sums_are_shared_and_corrections_stacked(name: str, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model(name))
    deltas = pooled_deltas(imported.description, 32)
    model = lowered(imported, MergeZeroPoints(deltas), measured=False, scheme="w4a8", group_size=32)
    per_layer = Counter(node.op_type for node in model.graph if SUMS in node.metadata_props)
    assert per_layer["ReduceSum"] == 2 * 4  # inputs of q/k/v, o, gate/up, down
    corrections = [node.metadata_props[OFFSET] for node in model.graph if OFFSET in node.metadata_props]
    assert sorted(name.count("+") for name in corrections) == [0, 0, 0, 0, 1, 1, 2, 2]
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert all(node.inputs[1] is None for node in attention), "q, k, v go in packed"


@pytest.mark.parametrize("only", [["q_proj", "v_proj"], ["k_proj"], ["up_proj"], ["down_proj", "o_proj"]])
def test_some_modules_alone(only: list[str], tiny_model: TinyModel) -> None:
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = pooled_deltas(imported.description, 32, only)
    assert len(deltas) == 2 * len(only)
    model = lowered(imported, MergeZeroPoints(deltas), scheme="w4a16", group_size=32, clip="none")
    assert drift(updated_logits(directory, deltas, Grid(4, 32)), logits(model)) < MERGED


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a8", "w6a6", "w4a4"])
def test_corrections_read_what_their_linears_read(scheme: str, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("mixtral"))
    deltas = pooled_deltas(imported.description, 32)
    model = lowered(imported, MergeZeroPoints(deltas), "r4", measured=False, scheme=scheme, group_size=32)
    inputs = linear_inputs(model)
    checked = 0
    for node in model.graph:
        if SUMS in node.metadata_props and node.inputs[0].producer().metadata_props.get(SUMS) is None:  # type: ignore[union-attr]
            assert {inputs[name] for name in node.metadata_props[SUMS].split("+")} == {node.inputs[0]}
            checked += 1
    assert checked == 2 * (3 + 4)  # q/k/v, o, experts' gate/up; each expert's down
    router = inputs["model.layers.0.mlp.gate.weight"]
    expert = inputs["model.layers.0.mlp.experts.0.up_proj.weight"]
    assert (router is expert) == (scheme not in ("w6a6", "w4a4"))


@pytest.mark.parametrize("what", ["correction", "merge", "sums"])
def test_what_is_left_out_shows(what: str, tiny_model: TinyModel) -> None:
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = pooled_deltas(imported.description, 32)
    expected = updated_logits(directory, deltas, Grid(4, 32))
    small = drift(updated_logits(directory, {}, Grid(4, 32)), expected)
    for step in steps(imported, MergeZeroPoints(deltas), scheme="w4a16", group_size=32, clip="none"):
        step(imported.model)
    for node in list(imported.model.graph):
        if what == "correction" and OFFSET in node.metadata_props:
            tensor = node.inputs[1]
            assert tensor is not None
            tensor.const_value = ir.tensor(np.zeros([int(d) for d in tensor.shape or ()], np.float32), name=tensor.name)
        if what == "merge" and node.op_type == "MatMulNBits" and len(node.inputs) > 3:
            node.replace_input_with(3, None)
        if what == "sums" and node.op_type == "ReduceSum":
            node.replace_input_with(0, node.inputs[0])
            node.op_type = "ReduceMax"
    assert drift(expected, logits(imported.model)) > 0.05 * small > 1e-3


def test_the_pass_is_idempotent_and_so_is_packing(tiny_model: TinyModel) -> None:
    imported = quantized_model(tiny_model("llama16"), Grid(4, 32))
    deltas = pooled_deltas(imported.description, 32)
    assert MergeZeroPoints(deltas)(imported.model).modified
    once = logits(imported.model)
    assert not MergeZeroPoints(deltas)(imported.model).modified
    assert np.array_equal(once, logits(imported.model))
    for step in steps(imported, None, scheme="w4a16", group_size=32)[2:]:
        step(imported.model)
        assert type(step).__name__ in ("SelectPositions", "StampOpset") or not step(imported.model).modified


def test_the_pass_reads_no_weight_and_each_is_quantized_once(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    plain = lazy_quantized.LazyQuantized._quantize

    def counted(self: lazy_quantized.LazyQuantized) -> lazy_quantized.Adapted:
        calls.append(self.parts[0].name)
        return plain(self)

    monkeypatch.setattr(lazy_quantized.LazyQuantized, "_quantize", counted)
    imported = import_model(tiny_model("llama16"))
    deltas = with_magnitudes(imported, pooled_deltas(imported.description, 32))
    for step in steps(imported, MergeZeroPoints(deltas), scheme="w4a16", group_size=32):
        step(imported.model)
    assert not calls
    for value in imported.model.graph.initializers.values():  # as the writer does
        assert value.const_value is not None
        value.const_value.numpy()
    assert len(calls) == 2 * 4, "q+k+v, o, gate+up and down of two layers, once each"


def test_rows_come_in_pieces(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is read in chunks of rows is adapted chunk by chunk: the same bytes."""
    directory = tiny_model("qwen2")
    found = []
    for limit in (64 << 20, 5 * 96 * 8):
        imported = quantized_model(directory, Grid(4, 32))
        deltas = with_magnitudes(import_model(directory), pooled_deltas(imported.description, 32))
        MergeZeroPoints(deltas)(imported.model)
        chunks = lazy_quantized.Weight.chunks
        monkeypatch.setattr(lazy_quantized.Weight, "chunks", lambda self, limit=limit, c=chunks: c(self, limit))
        tensors = imported.model.graph.initializers.items()
        found.append({name: value.const_value.numpy().tobytes() for name, value in tensors if ".0.mlp." in name})  # type: ignore[union-attr]
        monkeypatch.undo()
        lazy_quantized.forget()
    assert found[0] == found[1]


def test_what_does_not_fit_is_refused(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama-tied")
    imported = quantized_model(directory, Grid(4, 32))
    name = imported.description.claims[0].weight
    good = pooled_deltas(imported.description, 32)[name]
    with pytest.raises(InputError, match=r"q_proj.*not constant inside blocks of 32"):
        MergeZeroPoints(dense_deltas(imported.description))(imported.model)
    with pytest.raises(UnsupportedModelError, match="no linear of the graph"):
        MergeZeroPoints({"model.layers.9.mlp.up_proj.weight": good})(imported.model)
    with pytest.raises(InputError, match="for a weight of"):
        MergeZeroPoints({name: good.rows(slice(0, 8))})(imported.model)
    magnitude = np.ones(good.shape[0])
    magnitude[3] = 0
    with pytest.raises(InputError, match="output row 3 is 0"):
        MergeZeroPoints({name: replace(good, magnitude=magnitude)})(imported.model)
    with pytest.raises(SchemeError, match="stored as floats"):
        MergeZeroPoints({name: good})(import_model(directory).model)
    MergeZeroPoints({name: good})(imported.model)
    with pytest.raises(SchemeError, match="another adapter already"):
        MergeZeroPoints({name: replace(good)})(imported.model)
