"""Every exact pass on a tiny model of every family: the function does not move, and it does when a fold is left out."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import MODELS, TinyModel

from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import EXACT_DRIFT, probe_tokens
from rqc.compiler.probe import drift, run_stage
from rqc.models import algebra
from rqc.models.rotation import Rotation
from rqc.passes.norms import FuseNormGains
from rqc.passes.rotate import Rotate
from rqc.passes.ties import Untie
from rqc.runtime.errors import RotationError

SITES = ("r1", "r2", "r3", "r4")
SETS = [",".join(sites) for size in range(1, 5) for sites in combinations(SITES, size)]


def logits(imported: Imported) -> np.ndarray:
    return run_stage(imported.model, probe_tokens(imported.model))


def rotated(directory: Path, sites: str, hadamard: str = "full", *, untie: bool = False) -> Imported:
    imported = import_model(directory)
    if untie:
        Untie()(imported.model)
    FuseNormGains(imported.description)(imported.model)
    Rotate(imported.description, Rotation.parse(sites, hadamard))(imported.model)
    return imported


@pytest.mark.parametrize("name", MODELS)
def test_import_matches_transformers(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    imported = import_model(directory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(probe_tokens(imported.model))[None]).logits[0].numpy()
    assert drift(expected, logits(imported)) < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_every_valid_rotation_is_exact(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    plain = import_model(directory)
    before = logits(plain)
    refused = {site for site, _ in plain.description.family.refusals}
    for sites in SETS:
        if refused & set(sites.split(",")):
            with pytest.raises(RotationError, match="cannot be folded"):
                rotated(directory, sites)
        else:
            assert drift(before, logits(rotated(directory, sites))) < EXACT_DRIFT, sites


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "qwen3", "phi3"])
def test_block_hadamards_and_untied_tables_are_exact(name: str, tiny_model: TinyModel) -> None:
    directory = tiny_model(name)
    before = logits(import_model(directory))
    for untie in (False, True):
        assert drift(before, logits(rotated(directory, "r1,r2,r3,r4", "block", untie=untie))) < EXACT_DRIFT


@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "phi3", "qwen3-moe"])
@pytest.mark.parametrize("left_out", ["RotateIn", "RotateOut", "ScaleOut"])
def test_a_fold_left_out_breaks_the_function(
    name: str, left_out: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model(name)
    before = logits(import_model(directory))
    kind = getattr(algebra, left_out)
    monkeypatch.setattr(kind, "weight", lambda self, w, first_row, read: w)
    assert drift(before, logits(rotated(directory, "r1,r2,r4"))) > 1e-2


@pytest.mark.parametrize("name", ["llama-bias", "qwen2"])
def test_a_bias_left_out_breaks_the_function(name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model(name)
    before = logits(import_model(directory))
    monkeypatch.setattr(algebra.RotateOut, "bias", lambda self, b: b)
    assert drift(before, logits(rotated(directory, "r2"))) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma", "llama-tied"])
def test_norm_gains_left_behind_break_the_function(
    name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model(name)
    before = logits(import_model(directory))
    monkeypatch.setattr(algebra.ScaleIn, "weight", lambda self, w, first_row, read: w)
    assert drift(before, logits(rotated(directory, "r2"))) > 1e-2


def test_r1_needs_the_norms_folded(tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model("llama"))
    with pytest.raises(RotationError, match="norm gains"):
        Rotate(imported.description, Rotation.parse("r1"))(imported.model)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma"])
def test_passes_are_idempotent(name: str, tiny_model: TinyModel) -> None:
    imported = import_model(tiny_model(name))
    rotation = Rotation.parse("r1,r2,r3,r4")
    for step in (Untie(), FuseNormGains(imported.description), Rotate(imported.description, rotation)):
        step(imported.model)
        assert not step(imported.model).modified
