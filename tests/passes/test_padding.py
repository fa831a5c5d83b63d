"""Fused attention against the imported graph: right-padded batches and prompts longer than the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny import TinyModel

from rqc.compiler.importer import import_model
from rqc.compiler.passlist import passes_of
from rqc.compiler.probe import drift, feed, run_stage, save_stage
from rqc.compiler.recipe import Recipe
from rqc.models.rotation import Rotation

LENGTHS = (70, 9, 41)


def session(model: ir.Model, folder: Path) -> ort.InferenceSession:
    save_stage(model, folder / "stage.onnx")
    return ort.InferenceSession(folder / "stage.onnx")


def lowered(directory: Path, sites: str) -> ir.Model:
    imported = import_model(directory)
    recipe = Recipe.from_values({"scheme": "fp32"})
    for step in passes_of(recipe, imported.description, Rotation.parse(sites)):
        step(imported.model)
    return imported.model


def padded_feeds(run: ort.InferenceSession, ids: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """One call for all rows, each padded on the right with token 0."""
    feeds = {
        item.name: feed(item.name, [d if isinstance(d, int) else None for d in item.shape], ids)
        for item in run.get_inputs()
    }
    if "seqlens_k" in feeds:
        feeds["seqlens_k"] = (lengths - 1).astype(np.int32)
    if "attention_mask" in feeds:
        feeds["attention_mask"] = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return feeds


@pytest.mark.parametrize("sites", ["r1,r2,r4", "r3"])
@pytest.mark.parametrize("name", ["llama16", "mistral", "qwen3-16", "gemma3", "llama"])
def test_right_padded_rows_equal_rows_alone(name: str, sites: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name)
    sites = "r2,r4" if name == "gemma3" and "r1" in sites else sites
    run = session(lowered(directory, sites), tmp_path)
    ids = np.random.default_rng(2).integers(3, 96, (len(LENGTHS), max(LENGTHS)))
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = 0
    (logits,) = run.run(["logits"], padded_feeds(run, ids, np.asarray(LENGTHS)))
    plain = import_model(directory).model
    for row, length in enumerate(LENGTHS):
        assert drift(run_stage(plain, ids[row, :length]), logits[row, :length]) < 1e-5


@pytest.mark.parametrize("name", ["llama16", "mistral", "gemma2"])
def test_a_window_left_out_would_show(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = lowered(tiny_model(name), "r4")
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes.pop("local_window_size", None)
    run = session(model, tmp_path)
    ids = np.random.default_rng(2).integers(3, 96, (1, 70))
    (logits,) = run.run(["logits"], padded_feeds(run, ids, np.asarray([70])))
    moved = drift(run_stage(import_model(tiny_model(name)).model, ids[0]), logits[0])
    assert (moved < 1e-5) == (name == "llama16")
