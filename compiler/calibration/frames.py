"""--rotate auto and --method auto: measure what there is to choose from on the calibration text, with the engine's own
arithmetic, and take the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.adapters.merge import Merge
from rqc.compiler.calibration.blocks import perplexity
from rqc.compiler.calibration.calibrated import calibrated, calibrates, needed_bytes
from rqc.compiler.calibration.calibration_text import calibration_ids, divided
from rqc.compiler.calibration.clips import TOKENS as CLIP_TOKENS
from rqc.compiler.calibration.clips import search_bytes, searched_clips
from rqc.compiler.calibration.ranges import range_bytes, ranges_on_text
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress, Silent
from rqc.compiler.passlist import frame, grids
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

SAMPLES = 16
"""Windows of the text that codes are fitted to while there is a choice; they are scored on what follows."""


@dataclass(frozen=True)
class Choice:
    """A frame and a method of rounding, and what is said of how they were chosen."""

    rotation: Rotation
    method: str
    said: dict[str, Any]


def choose(
    recipe: Recipe, imported: Imported, progress: Progress, merge: Merge | None = None, *, measure: bool = True
) -> Choice:
    """The rotation of `--rotate auto` and the method of `--method auto`, or those that the recipe names. said: 'chosen'
    and 'scores', perplexities of every candidate, rounded to 4 digits, and the 'method' if that was chosen too.

    Adapters that are merged count: what is scored is the model that they make. With those to be switched, it is the
    model alone.
    """
    open_, rotations = _open(recipe), _rotations(recipe, imported)
    if not open_:
        return _choice(recipe, rotations[0], recipe.method, None)
    if not recipe.scheme.quantized:
        progress.line(f"{open_}: {rotations[0]}, nothing is quantized")
        return _choice(recipe, rotations[0], "rtn", None)
    methods = ("rtn", "gptq") if recipe.method == "auto" else (recipe.method,)
    fitted, ids = _texts(recipe, imported, fits="gptq" in methods or calibrates(recipe)) if measure else (None, None)
    obstacle = _obstacle([replace(recipe, method=method) for method in methods], imported, measure, fitted, ids)
    if ids is None or obstacle:
        coarse = recipe.scheme.activation_bits <= COARSE_ACTIVATIONS
        chosen = rotations[-1] if coarse else rotations[0]
        progress.line(f"{open_}: {chosen}, {methods[0]}, by the scheme alone, because {obstacle}")
        return _choice(recipe, chosen, methods[0], None)
    scores = {
        (rotation, method): _score(replace(recipe, method=method), imported, rotation, fitted, ids, merge)
        for rotation in rotations
        for method in methods
    }
    best = {rotation: min(methods, key=lambda method: scores[rotation, method]) for rotation in rotations}
    figures = [scores[rotation, best[rotation]] for rotation in rotations]
    chosen = rotations[-1] if figures[-1] <= MARGIN * figures[0] else rotations[0]
    said = {_label(recipe, *candidate): score for candidate, score in scores.items()}
    told = ", ".join(f"{name} {score:g}" for name, score in said.items())
    progress.line(
        f"{open_}: {_label(recipe, chosen, best[chosen])} (perplexity on {ids.size} calibration tokens: {told})"
    )
    return _choice(recipe, chosen, best[chosen], said)


def _open(recipe: Recipe) -> str:
    """What the recipe leaves open, in words."""
    return " and ".join(
        name for name, value in (("rotate auto", recipe.rotate), ("method auto", recipe.method)) if value == "auto"
    )


def _choice(recipe: Recipe, rotation: Rotation, method: str, scores: dict[str, float] | None) -> Choice:
    said = {"chosen": str(rotation), "scores": scores, **({"method": method} if recipe.method == "auto" else {})}
    return Choice(rotation, method, said)


def _label(recipe: Recipe, rotation: Rotation, method: str) -> str:
    """A candidate by what there is to choose."""
    if recipe.method != "auto":
        return str(rotation)
    return f"{rotation} {method}" if recipe.rotate == "auto" else method


def _rotations(recipe: Recipe, imported: Imported) -> tuple[Rotation, ...]:
    """The rotation asked for, or none and the rotated frame."""
    if recipe.rotation is not None:
        return (recipe.rotation,)
    none = Rotation.parse("none", recipe.hadamard, recipe.rotation_seed)
    return (none, _candidate(recipe, imported)) if recipe.scheme.quantized else (none,)


def _candidate(recipe: Recipe, imported: Imported) -> Rotation:
    """R1, R2 and R4, without what the family refuses."""
    refused = {site for site, _ in imported.description.family.refusals}
    sites = [site for site in ("r1", "r2", "r4") if site not in refused]
    return Rotation.parse(sites, recipe.hadamard, recipe.rotation_seed)


def _texts(
    recipe: Recipe, imported: Imported, *, fits: bool
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Windows of the calibration text that codes are fitted to (None where nothing is), and those to score on."""
    if not fits:
        return None, calibration_ids(recipe, imported, TOKENS)
    length = min(recipe.calibration_length, imported.description.architecture.context_length)
    samples = min(recipe.calibration_samples, SAMPLES) + max(1, TOKENS // length)
    ids = calibration_ids(replace(recipe, calibration_samples=samples), imported, samples * length)
    return (None, None) if ids is None else divided(ids, TOKENS)


def _score(
    recipe: Recipe,
    imported: Imported,
    rotation: Rotation,
    fitted: NDArray[np.int64] | None,
    ids: NDArray[np.int64],
    merge: Merge | None,
) -> float:
    """Perplexity of the quantized graph in this frame, four significant digits. The graph is built anew: weights are
    lazy."""
    recipe = searched_clips(recipe, imported, rotation, merge, Silent())
    findings = calibrated(recipe, imported, rotation, merge, Silent(), fitted)
    fresh = import_model(imported.checkpoint.directory)
    steps = [*frame(recipe, fresh.description, rotation, merge), *grids(recipe, fresh.description, findings)]
    steps += [] if merge is None or merge.names else merge.after_grid(rotation)
    target = onnx if recipe.target == "onnx" else tensorrt
    measure = ranges_on_text(recipe, fresh, Silent())
    packed = [*target.packing(recipe, fresh.description, measure), *target.by_blocks(), RemoveDeadParts()]
    for step in [*steps, *packed, *target.activations(recipe)]:
        step(fresh.model)
    return float(f"{perplexity(fresh.model, ids):.4g}")


def _obstacle(
    recipes: Sequence[Recipe],
    imported: Imported,
    measure: bool,
    fitted: NDArray[np.int64] | None,
    ids: NDArray[np.int64] | None,
) -> str:
    """Why these cannot all be measured, or nothing."""
    if not measure:
        return "a dry run reads no weights"
    if ids is None:
        return "the model has no tokenizer.json"
    if ids.shape[1] < 2:
        return "the text is too short: a token is predicted from another"
    limit = recipes[0].max_memory
    if limit is None:
        return ""
    needed = resident_bytes() + max(_needed(recipe, imported, fitted, ids) for recipe in recipes)
    if needed <= limit:
        return ""
    return f"measuring takes about {needed / 2**30:.1f} GiB and --max-memory is {limit / 2**30:.1f} GiB"


def _needed(recipe: Recipe, imported: Imported, fitted: NDArray[np.int64] | None, ids: NDArray[np.int64]) -> int:
    """Bytes that `_score` takes: of its steps, the largest."""
    length = min(recipe.calibration_length, imported.description.architecture.context_length)
    short = min(length, CLIP_TOKENS)
    steps = [needed_bytes(recipe, imported, fitted), block_bytes(imported, recipe, ids.size, ids.shape[1])]
    if recipe.activation_clip == "auto":
        steps.append(search_bytes(imported, CLIP_TOKENS // short, short))
    if recipe.target != "onnx" and tensorrt.has_static_activations(recipe):
        steps.append(range_bytes(recipe, imported, recipe.calibration_samples, length))
    return max(steps)
