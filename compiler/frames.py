"""--rotate auto: measure both frames on the calibration text, with the engine's own arithmetic, and take the better
one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.calibrate import perplexity
from rqc.compiler.calibration_text import calibration_ids
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress, Silent
from rqc.compiler.merge import Merge
from rqc.compiler.passlist import frame, grids
from rqc.compiler.ranges import ranges_on_text
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import block_bytes, resident_bytes
from rqc.compiler.targets import onnx, tensorrt
from rqc.models.rotation import Rotation
from rqc.passes.cleanup import RemoveDeadParts

TOKENS = 2048
MARGIN = 1.01
"""The rotated frame is taken unless its perplexity is worse by more than this factor."""
COARSE_ACTIVATIONS = 6
"""Activations of so many bits and fewer are rotated where nothing can be measured."""

Verdict = tuple[Rotation, dict[str, Any]]


def choose_frame(
    recipe: Recipe, imported: Imported, progress: Progress, merge: Merge | None = None, *, measure: bool = True
) -> Verdict:
    """The rotation of `--rotate auto` and {'chosen', 'scores'}: perplexities of both frames, rounded to 4 digits.

    Adapters that are merged count: what is scored is the model that they make. With those to be switched, it is the
    model alone.
    """
    none = Rotation.parse("none", recipe.hadamard, recipe.rotation_seed)
    rotated = _candidate(recipe, imported)
    if not recipe.scheme.quantized:
        progress.line("rotate auto: none, nothing is quantized")
        return none, _said(none, None)
    ids = calibration_ids(recipe, imported, TOKENS) if measure else None
    obstacle = _obstacle(recipe, imported, measure, ids)
    if ids is None or obstacle:
        chosen = rotated if recipe.scheme.activation_bits <= COARSE_ACTIVATIONS else none
        progress.line(f"rotate auto: {chosen}, by the scheme alone, because {obstacle}")
        return chosen, _said(chosen, None)
    scores = {str(rotation): _score(recipe, imported, rotation, ids, merge) for rotation in (none, rotated)}
    chosen = rotated if scores[str(rotated)] <= MARGIN * scores[str(none)] else none
    told = ", ".join(f"{name} {score:g}" for name, score in scores.items())
    progress.line(f"rotate auto: {chosen} (perplexity on {ids.size} calibration tokens: {told})")
    return chosen, _said(chosen, scores)


def _said(chosen: Rotation, scores: dict[str, float] | None) -> dict[str, Any]:
    return {"chosen": str(chosen), "scores": scores}


def _candidate(recipe: Recipe, imported: Imported) -> Rotation:
    """R1, R2 and R4, without what the family refuses."""
    refused = {site for site, _ in imported.description.family.refusals}
    sites = [site for site in ("r1", "r2", "r4") if site not in refused]
    return Rotation.parse(sites, recipe.hadamard, recipe.rotation_seed)


def _score(
    recipe: Recipe, imported: Imported, rotation: Rotation, ids: NDArray[np.int64], merge: Merge | None
) -> float:
    """Perplexity of the quantized graph in this frame, four significant digits. The graph is built anew: weights are
    lazy."""
    fresh = import_model(imported.checkpoint.directory)
    steps = [*frame(recipe, fresh.description, rotation, merge), *grids(recipe, fresh.description)]
    steps += [] if merge is None or merge.names else merge.after_grid(rotation)
    target = onnx if recipe.target == "onnx" else tensorrt
    measure = ranges_on_text(recipe, fresh, Silent())
    packed = [*target.packing(recipe, fresh.description, measure), *target.by_blocks(), RemoveDeadParts()]
    for step in [*steps, *packed, *target.activations(recipe)]:
        step(fresh.model)
    return float(f"{perplexity(fresh.model, ids):.4g}")


def _obstacle(recipe: Recipe, imported: Imported, measure: bool, ids: NDArray[np.int64] | None) -> str:
    """Why nothing can be measured, or nothing."""
    if not measure:
        return "a dry run reads no weights"
    if ids is None:
        return "the model has no tokenizer.json"
    if recipe.max_memory is None:
        return ""
    needed = resident_bytes() + block_bytes(imported, recipe, TOKENS)
    if needed <= recipe.max_memory:
        return ""
    return f"measuring takes about {needed / 2**30:.1f} GiB and --max-memory is {recipe.max_memory / 2**30:.1f} GiB"
