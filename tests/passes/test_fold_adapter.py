"""FoldAdapter: the function changes by exactly c B A, once, in whichever basis the graph is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from tiny import TinyModel

from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import probe_tokens
from rqc.compiler.passlist import grids
from rqc.compiler.probe import drift, run_stage
from rqc.compiler.recipe import Recipe
from rqc.models.delta import Delta
from rqc.models.rotation import Rotation
from rqc.passes.adapters import FoldAdapter
from rqc.passes.base import weight_of
from rqc.passes.norms import FuseNormGains
from rqc.passes.rotate import Rotate
from rqc.runtime.errors import InputError, UnsupportedModelError


def random_deltas(imported: Imported, *, dora: bool = False) -> dict[str, Delta]:
    """Rank 3 for every linear of the blocks."""
    draw = np.random.default_rng(3)
    deltas = {}
    for claim in imported.description.claims:
        n, k = imported.description.shape(claim)
        weight = stored(imported, claim.weight)
        magnitude = np.linalg.norm(weight, axis=1) * draw.uniform(0.8, 1.2, n) if dora else None
        a, b = draw.normal(size=(3, k)) / np.sqrt(k), 0.1 * draw.normal(size=(n, 3))
        deltas[claim.weight] = Delta(a, b, 0.5, magnitude)
    return deltas


def stored(imported: Imported, name: str) -> np.ndarray:
    weight = weight_of(imported.model.graph.initializers[name])
    assert weight is not None
    return weight.read()


def logits(model: ir.Model) -> np.ndarray:
    return run_stage(model, probe_tokens(model))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_weights_become_what_the_equation_says(dora: bool, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("phi3"))
    deltas = random_deltas(imported, dora=dora)
    before = {name: stored(imported, name) for name in deltas}
    FoldAdapter(deltas)(imported.model)
    for name, delta in deltas.items():
        expected = before[name] + 0.5 * delta.b @ delta.a
        if dora:
            assert delta.magnitude is not None
            expected *= (delta.magnitude / np.linalg.norm(expected, axis=1))[:, None]
        np.testing.assert_allclose(stored(imported, name), expected, rtol=0, atol=1e-14)


def test_the_second_run_changes_nothing(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("llama-bias"))
    step = FoldAdapter(random_deltas(imported))
    before = logits(imported.model)
    assert step(imported.model).modified
    once = logits(imported.model)
    assert not step(imported.model).modified
    assert not FoldAdapter(step.deltas)(imported.model).modified
    np.testing.assert_array_equal(logits(imported.model), once)
    assert drift(before, once) > 1e-2
    assert not step.exact


def test_subtraction_undoes_addition(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("qwen2"))
    before = logits(imported.model)
    deltas = random_deltas(imported)
    FoldAdapter(deltas)(imported.model)
    FoldAdapter(deltas, -1.0)(imported.model)
    assert drift(before, logits(imported.model)) < 1e-6
    with pytest.raises(InputError, match="DoRA"):
        FoldAdapter(random_deltas(imported, dora=True), -1.0)(imported.model)


def test_merge_then_rotate_keeps_the_function(tiny_model: TinyModel) -> None:
    plain, turned = (import_model(tiny_model("llama-bias")) for _ in range(2))
    step = FoldAdapter(random_deltas(plain, dora=True))
    for imported in (plain, turned):
        step(imported.model)
    FuseNormGains(turned.description)(turned.model)
    Rotate(turned.description, Rotation.parse("r1,r2,r3,r4"))(turned.model)
    assert drift(logits(plain.model), logits(turned.model)) < 1e-5


def test_rounded_weights_take_no_fold(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("llama16"))
    step = FoldAdapter(random_deltas(imported))
    for quantize in grids(Recipe(), imported.description):
        quantize(imported.model)
    with pytest.raises(UnsupportedModelError, match="as floats") as error:
        step(imported.model)
    assert "before the weights are quantized" in error.value.hint
