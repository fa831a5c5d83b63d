"""Rotate with learned matrices: as exact as with Hadamards, and not where a fold, or a layer's own R2, is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from learned_files import random_rotation
from tiny import TinyModel

from rqc.compiler.importer import import_model
from rqc.compiler.instruments import EXACT_DRIFT, probe_tokens
from rqc.compiler.probe import drift, run_stage
from rqc.models import algebra
from rqc.models.learned import Array, Learned
from rqc.models.reference import Reference
from rqc.passes.norms import FuseNormGains
from rqc.passes.rotate import Rotate
from rqc.passes.ties import Untie

FAMILIES = ("llama-tied", "llama-bias", "qwen3", "phi3", "gemma", "qwen3-moe")


def logits(directory: Path, sites: str = "", *, untie: bool = False) -> np.ndarray:
    imported = import_model(directory)
    if untie:
        Untie()(imported.model)
    if sites:
        FuseNormGains(imported.description)(imported.model)
        Rotate(imported.description, random_rotation(directory, sites))(imported.model)
    return run_stage(imported.model, probe_tokens(imported.model))


@pytest.mark.parametrize("name", FAMILIES)
def test_learned_rotations_are_exact(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    before = logits(directory)
    for sites in ("r1", "r2", "r1,r2,r3,r4"):
        assert drift(before, logits(directory, sites)) < EXACT_DRIFT, sites
    assert drift(before, logits(directory, "r1,r2,r4", untie=True)) < EXACT_DRIFT


@pytest.mark.parametrize("left_out", ["RotateIn", "RotateOut"])
def test_a_fold_left_out_breaks_the_function(
    left_out: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("qwen2")
    before = logits(directory)
    monkeypatch.setattr(getattr(algebra, left_out), "weight", lambda self, w, first_row, read: w)
    assert drift(before, logits(directory, "r1,r2")) > 1e-2


def test_a_matrix_that_changes_between_its_folds_breaks_the_function(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, calls = tiny_model("llama16"), iter(range(1000))
    before, matrix = logits(directory), Learned.matrix

    def other_layer(self: Learned, site: str, n: int, layer: int = 0) -> Array:
        return matrix(self, site, n, next(calls) % 2 if site == "r2" else layer)

    monkeypatch.setattr(Learned, "matrix", other_layer)
    assert drift(before, logits(directory, "r2")) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_pytorch_folds_the_same(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    reference = Reference.load(directory)
    ids = np.arange(3, 40, dtype=np.int64)
    before = reference.logits(ids)
    reference.rotate(random_rotation(directory, "r1,r2,r3,r4"), tied=reference.description.architecture.tied)
    assert drift(before, reference.logits(ids)) < EXACT_DRIFT
