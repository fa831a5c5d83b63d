"""Graphs lowered for TensorRT, run on ONNX Runtime: nothing fused, caches of fixed size that begin as garbage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from rqc.compiler.importer import Imported, import_model
from rqc.compiler.passlist import frame, grids
from rqc.compiler.probe import let_look_up, save_stage
from rqc.compiler.recipe import Recipe
from rqc.compiler.targets import tensorrt
from rqc.compiler.targets.settle import settled
from rqc.passes.base import Pass

Array = np.ndarray[Any, Any]


def valid_sites(name: str) -> str:
    """All rotations that a tiny model takes."""
    return "r2,r3,r4" if name in ("olmo2", "gemma2", "gemma3") else "r1,r2,r3,r4"


def on_grid(directory: Path, **options: Any) -> tuple[Imported, Recipe]:
    """A model in its frame and on its grid, before anything is lowered, and the settled recipe."""
    imported = import_model(directory)
    recipe = Recipe.from_values({"target": "tensorrt-rtx", "rotate": "none", **options})
    recipe = settled(recipe, imported.description.architecture, None)
    assert recipe.rotation is not None
    for step in [*frame(recipe, imported.description, recipe.rotation), *grids(recipe, imported.description)]:
        step(imported.model)
    return imported, recipe


def exact_steps(imported: Imported, recipe: Recipe) -> list[Pass]:
    """The exact part of the lowering."""
    steps = [*tensorrt.packing(recipe, imported.description), *tensorrt.lowering(recipe)]
    return [step for step in steps if step.exact]


def session(model: ir.Model) -> ort.InferenceSession:
    """A stage on ONNX Runtime without fusions, which round activations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with tempfile.TemporaryDirectory() as folder:
        save_stage(model, Path(folder) / "stage.onnx")
        let_look_up(model, Path(folder) / "stage.onnx")
        return ort.InferenceSession(Path(folder) / "stage.onnx", options, providers=["CPUExecutionProvider"])


class Cached:
    """A session with its caches, kept from call to call: `rows` rows of `capacity` slots."""

    def __init__(self, made: ort.InferenceSession, rows: int = 1, capacity: int = 64) -> None:
        self.session = made
        self.outputs = [item.name for item in made.get_outputs()]
        draw = np.random.default_rng(rows)
        self.caches = {
            item.name: draw.normal(0, 5, (rows, item.shape[1], capacity, item.shape[3])).astype(
                np.float16 if "float16" in item.type else np.float32
            )
            for item in made.get_inputs()
            if item.name.startswith("past_key_values.")
        }

    @classmethod
    def joined(cls, rows: list[Cached]) -> Cached:
        """Rows that were read one by one, as one batch."""
        whole = cls(rows[0].session)
        whole.caches = {name: np.concatenate([row.caches[name] for row in rows]) for name in rows[0].caches}
        return whole

    def read(self, ids: Any, starts: Any = 0, gates: Any = None) -> Array:
        """Logits float32 [rows, n, vocab] of the next tokens [rows, n], which begin at these positions."""
        tokens = np.atleast_2d(np.asarray(ids, np.int64))
        positions = np.arange(tokens.shape[1]) + np.broadcast_to(np.asarray(starts, np.int64), len(tokens))[:, None]
        asked = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
        known: dict[str, Array] = {"input_ids": tokens, "position_ids": positions, "logits_positions": asked}
        if gates is not None:
            known["adapter_gates"] = np.asarray(gates, np.float32)
        feeds = {item.name: known.get(item.name, self.caches.get(item.name)) for item in self.session.get_inputs()}
        results = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        self.caches = {name: results[name.replace("past_key_values", "present")] for name in self.caches}
        return np.asarray(results["logits"], np.float32)
