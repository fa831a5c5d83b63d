"""What calibration finds for a model in one frame: codes for every linear of the blocks, fitted to what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.adapters.merge import Merge
from rqc.compiler.calibration.blockwise import Round, calibrate, solve_by_weights
from rqc.compiler.calibration.calibration_text import required_ids, tell_shortened
from rqc.compiler.calibration.compensation import budgeted_ranks
from rqc.compiler.calibration.findings import Findings
from rqc.compiler.calibration.memory import calibration_bytes, weights_bytes
from rqc.compiler.calibration.solver import Solver
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress, Silent
from rqc.compiler.passlist import frame, grids
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import resident_bytes
from rqc.compiler.targets import onnx, tensorrt
from rqc.compiler.targets.grids import token_grid
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.passes.base import CLIP, Pass
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.errors import ResourceError


def solves(recipe: Recipe) -> bool:
    """Whether a compile by that recipe finds codes, zeros or branches otherwise than by rounding to nearest."""
    asked = recipe.method == "gptq" or recipe.compensate != "none" or recipe.sparsity != "none"
    return recipe.scheme.quantized and asked


def calibrates(recipe: Recipe) -> bool:
    """Whether it looks at what linears read for that; LoftQ and zeros by magnitude follow from weights alone."""
    pruned_by_text = recipe.sparsity != "none" and recipe.prune == "wanda"
    return solves(recipe) and (recipe.method == "gptq" or recipe.compensate == "eora" or pruned_by_text)


def reads_text(recipe: Recipe) -> bool:
    """Whether a compile by that recipe, settled for its target, looks at calibration text."""
    chosen = recipe.scheme.quantized and "auto" in (recipe.rotate, recipe.method, recipe.activation_clip)
    static = recipe.target != "onnx" and tensorrt.has_static_activations(recipe)
    return calibrates(recipe) or chosen or static or recipe.bits_budget is not None or recipe.kv_cache != "float"


def tell_unread(recipe: Recipe, progress: Progress) -> None:
    """Say it where options of the text were given, and nobody looks at it."""
    if any(name.startswith("calibration") for name in recipe.given) and not reads_text(recipe):
        progress.line("calibration: nothing is measured here, the text is not looked at")


def calibrated(
    recipe: Recipe,
    imported: Imported,
    rotation: Rotation,
    merge: Merge | None,
    progress: Progress,
    ids: NDArray[np.int64] | None = None,
) -> Findings | None:
    """Run the model in its frame over the calibration text (`ids` if given) and fit codes to it, or find them from the
    weights alone where no text is needed; None where the recipe asks for nothing of the kind. Adapters count where they
    are folded; beside the grid they are left out.

    Raises InputError without a tokenizer, ResourceError where it does not fit under --max-memory, CheckpointError,
    naming the linear, for moments that are not finite.
    """
    if not solves(recipe):
        return None
    if not calibrates(recipe):
        ids = None
    elif ids is None:
        ids = _text(recipe, imported, progress)
    _check_memory(recipe, imported, ids)
    found = _run(recipe, imported, rotation, merge, ids, None, progress)
    if recipe.compensate_budget is not None:
        ranks = budgeted_ranks(recipe, found.spectra, {name: codes().shape for name, codes in found.found.items()})
        progress.line(f"compensation: ranks {min(ranks.values())} to {max(ranks.values())}, within the budget")
        found = _run(recipe, imported, rotation, merge, ids, ranks, progress)
    ratios = sorted(fit.error / fit.nearest for fit in found.fits.values() if fit.nearest)
    if ratios:
        told = f"error {ratios[len(ratios) // 2]:.2f} × that of rounding to nearest (median)"
        looked = "the weights alone" if ids is None else f"{ids.size} tokens"
        progress.line(f"calibration: {recipe.method} on {looked}, {told}")
    return found


def _run(
    recipe: Recipe,
    imported: Imported,
    rotation: Rotation,
    merge: Merge | None,
    ids: NDArray[np.int64] | None,
    ranks: Mapping[str, int] | None,
    progress: Progress,
) -> Findings:
    """Once through the model, built anew: weights are lazy."""
    fresh = import_model(imported.checkpoint.directory)
    for step in frame(recipe, fresh.description, rotation, merge):
        step(fresh.model)
    found = Findings(0 if ids is None else int(ids.size))
    rounds = next(one for one in grids(recipe, fresh.description) if isinstance(one, QuantizeLinears))
    solver = Solver(recipe, rounds, found, ranks)
    names = {claim.weight for claim in fresh.description.claims if claim.quantized}
    if ids is None:
        solve_by_weights(fresh.model, names, solver, lambda done, total: progress.advance("calibration", done, total))
        return found
    calibrate(
        fresh.model,
        names,
        ids,
        solver,
        lambda block: _deployed(recipe, fresh.description, found.of(block)),
        lambda node: _rounding(recipe, node),
        lambda done, total: progress.advance("calibration", done, total),
        crossed=_crosses(recipe),
    )
    return found


def _text(recipe: Recipe, imported: Imported, progress: Progress) -> NDArray[np.int64]:
    tokens = recipe.calibration_samples * recipe.calibration_length
    ids = required_ids(recipe, imported, tokens, f"{_asked(recipe)} looks at calibration text", "leave it out")
    tell_shortened(recipe, imported, ids, recipe.calibration_samples, progress)
    description = imported.description
    inputs = max(description.shape(claim)[1] for claim in description.claims if claim.quantized)
    if ids.size < inputs:
        progress.line(f"calibration: {ids.size} tokens tell little of linears with {inputs} inputs; more text would")
    return ids


def _asked(recipe: Recipe) -> str:
    """The option for which something is measured."""
    if recipe.method == "gptq":
        return "--method gptq"
    return f"--compensate {recipe.compensate}" if recipe.compensate != "none" else f"--sparsity {recipe.sparsity}"


def calibration_need(recipe: Recipe, imported: Imported) -> int:
    """Bytes that `calibrated` will take: the text is read for it, no weight is. Raises InputError as it does."""
    return needed_bytes(recipe, imported, _text(recipe, imported, Silent()) if calibrates(recipe) else None)


def needed_bytes(recipe: Recipe, imported: Imported, ids: NDArray[np.int64] | None) -> int:
    """Bytes that `calibrated` takes on these windows; None: of a recipe that reads none."""
    if not solves(recipe):
        return 0
    if ids is None:
        return weights_bytes(imported)
    return calibration_bytes(imported, *ids.shape, crossed=_crosses(recipe))


def _crosses(recipe: Recipe) -> bool:
    """Whether codes or branches make up for the rounding of activations too."""
    return recipe.scheme.coarse_activations and (recipe.method == "gptq" or recipe.compensate == "eora")


def _check_memory(recipe: Recipe, imported: Imported, ids: NDArray[np.int64] | None) -> None:
    """Raise ResourceError, before a weight is read, where calibration does not fit under --max-memory."""
    if recipe.max_memory is None:
        return
    needed = resident_bytes() + needed_bytes(recipe, imported, ids)
    if needed > recipe.max_memory:
        shorter = "" if ids is None else "lower --calibration-length, "
        raise ResourceError(
            f"calibration takes about {needed / 2**30:.2f} GiB, --max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint=f"raise --max-memory, {shorter}or leave {_asked(recipe)} out",
        )


def _deployed(recipe: Recipe, description: Description, result: Findings) -> list[Pass]:
    """What makes of a float block what the engine computes; static ranges, which are found later, are left out.

    Only where the kernel rounds activations is its own form needed: many tokens run faster in any other.
    """
    target = onnx if recipe.target == "onnx" else tensorrt
    by_kernel = recipe.target == "onnx" and recipe.scheme.activation_bits == 8
    static = recipe.target != "onnx" and tensorrt.has_static_activations(recipe)
    return [
        *grids(recipe, description, result),
        *(target.packing(recipe, description) if by_kernel else []),
        *target.by_blocks(),
        *([] if static else target.activations(recipe)),
    ]


def _rounding(recipe: Recipe, node: ir.Node) -> Round | None:
    """How the graph rounds what a linear reads. What a kernel rounds to 8 bits is next to what it was."""
    if recipe.scheme.activation_bits >= 8:
        return None
    tokens = token_grid(recipe)
    return replace(tokens, clip=float(node.metadata_props.get(CLIP, tokens.clip))).round
