"""Branches whose factors are codes: the graph computes with what the codes stand for, in every form on its way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from side_path_models import dense_deltas, logits, updated_logits
from tiny import TinyModel

from rqc.compiler.calibration.findings import Findings
from rqc.compiler.importer import import_model
from rqc.compiler.manifest import layers
from rqc.compiler.passlist import passes_of
from rqc.compiler.probe import drift
from rqc.compiler.recipe import Recipe
from rqc.models.delta import Delta
from rqc.models.factors import LOSS, coded, costs_nothing, factor_grid
from rqc.models.grid import Grid
from rqc.models.rotation import Rotation
from rqc.passes.base import BRANCH_A, BRANCH_B, Pass
from rqc.passes.branch_codes import CodeBranches

SAME = 1e-5
RANKS = (4, 16, 24)


def ranked(deltas: dict[str, Delta], description: object) -> dict[str, Delta]:
    """Updates of different ranks, of a size that shows."""
    generator, found = np.random.default_rng(1), {}
    for index, (name, delta) in enumerate(deltas.items()):
        rank = RANKS[index % len(RANKS)]
        a, b = (generator.standard_normal(size) for size in ((rank, delta.shape[1]), (delta.shape[0], rank)))
        found[name] = replace(delta, a=a, b=0.01 * b)
    return found


def passes(deltas: dict[str, Delta], floats: set[str], description: object, scheme: str) -> list[Pass]:
    findings = Findings(0, deltas=deltas, coded=set(deltas) - floats)
    tables = {"embedding_bits": 32, "head_bits": 32}
    recipe = Recipe.from_values({"scheme": scheme, "clip": "none", "compensate": "eora", **tables})
    return passes_of(recipe, description, Rotation.parse("none"), findings=findings)  # type: ignore[arg-type]


def in_front_of_activations(found: list[Pass]) -> list[Pass]:
    return [step for step in found if step.label != "Int8Accumulation"]


@pytest.mark.parametrize("name", ["llama16", "phi3", "mixtral"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_the_graph_computes_with_the_codes(name: str, scheme: str, tiny_model: TinyModel) -> None:
    """Two planes of 4 bits, or one product of 8 bits in front of int8 accumulation; ranks that fill no block."""
    directory = tiny_model(name)
    imported = import_model(directory)
    deltas = ranked(dense_deltas(imported.description), imported.description)
    expected = updated_logits(directory, {key: coded(delta) for key, delta in deltas.items()}, Grid(4, 32))
    assert drift(updated_logits(directory, deltas, Grid(4, 32)), expected) > 1e-4, "otherwise this test shows nothing"
    for step in in_front_of_activations(passes(deltas, set(), imported.description, scheme)):
        before = logits(imported.model)
        step(imported.model)
        assert not step.exact or drift(before, logits(imported.model)) < SAME, step
    assert drift(expected, logits(imported.model)) < SAME
    marked = [node for node in imported.model.graph if {BRANCH_A, BRANCH_B} & set(node.metadata_props)]
    assert {node.op_type for node in marked} == {"MatMulNBits"}
    rows = [row for row in layers(imported.model) if " branch " in row["name"]]
    assert {(row["bits"], row["storage_bits"]) for row in rows} == {(8, 4 if scheme == "w4a16" else 8)}


def test_what_codes_would_harm_stays_floats(tiny_model: TinyModel) -> None:
    """And so does what is stacked with it; the pass has nothing to do a second time."""
    directory = tiny_model("llama16")
    imported = import_model(directory)
    deltas = ranked(dense_deltas(imported.description), imported.description)
    floats = {name for name in deltas if name.endswith(("k_proj.weight", "down_proj.weight"))}
    for step in passes(deltas, floats, imported.description, "w4a16"):
        step(imported.model)
    kinds = Counter(
        (mark, node.op_type)
        for node in imported.model.graph
        for mark in (BRANCH_A, BRANCH_B)
        if mark in node.metadata_props
    )
    # a layer: A of q, k and v is one, of gate and up one; B each by itself
    assert kinds == {
        (BRANCH_A, "MatMul"): 2 * 2, (BRANCH_A, "MatMulNBits"): 2 * 2 * 2,
        (BRANCH_B, "MatMul"): 2 * 2, (BRANCH_B, "MatMulNBits"): 2 * 5 * 2,
    }  # fmt: skip
    mixed = {name: _mixed(name, delta) for name, delta in deltas.items()}
    assert drift(updated_logits(directory, mixed, Grid(4, 32)), logits(imported.model)) < SAME
    assert not CodeBranches()(imported.model).modified


def _mixed(name: str, delta: Delta) -> Delta:
    """What is left of an update where those of k_proj and down_proj are floats: A of q, k and v is one matrix."""
    codes = coded(delta)
    if name.endswith(("k_proj.weight", "down_proj.weight")):
        return delta
    together = name.endswith(("q_proj.weight", "v_proj.weight"))
    return Delta(delta.a, codes.b) if together else codes


def test_every_sum_of_planes_is_one_of_floats(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("llama16"))
    deltas = ranked(dense_deltas(imported.description), imported.description)
    for step in passes(deltas, set(), imported.description, "w4a16"):
        step(imported.model)
    stored = [value.const_value for value in imported.model.graph.initializers.values()]
    beside = [tensor for tensor in stored if tensor is not None and ".branch" in (tensor.name or "")]
    assert {tensor.dtype for tensor in beside} == {ir.DataType.UINT8, ir.DataType.FLOAT}
    entries = sum(delta.rank * sum(delta.shape) for delta in deltas.values())
    assert sum(tensor.nbytes for tensor in beside) < 0.8 * 4 * entries  # of floats; narrow factors fill few blocks


@pytest.mark.parametrize(("width", "block"), [(16, 16), (32, 32), (48, 16), (64, 64), (576, 64), (1536, 64), (5, 16)])
def test_blocks_of_factors_pad_least(width: int, block: int) -> None:
    assert factor_grid(width).group_size == block


@pytest.mark.parametrize("moments", [True, False])
def test_codes_lose_nothing_of_an_error_and_much_of_an_exact_branch(moments: bool) -> None:
    """The objective grows by what rounding of the factors is, beside what a branch leaves anyway."""
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal((8, 96)), generator.standard_normal((64, 8))
    x = generator.standard_normal((500, 96)) * np.exp(generator.standard_normal(96))
    second = x.T @ x if moments else None
    weighed = np.eye(96) if second is None else second
    rest = generator.standard_normal((64, 96))
    for size, expected in ((3.0, True), (0.0, False)):
        delta, difference = Delta(a, b), b @ a + size * rest
        left = [difference - one.dense() for one in (delta, coded(delta))]
        plain, codes = (float(np.einsum("nk,kj,nj->", one, weighed, one)) for one in left)
        assert costs_nothing(delta, difference, second) == expected == (codes <= (1 + LOSS) * plain)


@pytest.mark.parametrize(("growth", "lost"), [(0.9e-3, False), (1.1e-3, True)])
def test_codes_may_cost_a_thousandth(growth: float, lost: bool) -> None:
    """What a branch leaves anyway is orthogonal to what codes change, and of the length that makes it grow so."""
    generator = np.random.default_rng(4)
    delta = Delta(generator.standard_normal((8, 96)), generator.standard_normal((64, 8)))
    change, rest = coded(delta).dense() - delta.dense(), generator.standard_normal((64, 96))
    rest -= change * (change * rest).sum() / (change**2).sum()
    rest *= np.linalg.norm(change) / np.linalg.norm(rest) / np.sqrt(growth)
    assert costs_nothing(delta, delta.dense() + rest) is not lost
