"""What calibration finds for a model in one frame: codes for every linear of the blocks, fitted to what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.adapters.merge import FOLD, Merge
from rqc.compiler.calibration.blockwise import ROWS_AT_ONCE, Round, calibrate, solve_by_weights
from rqc.compiler.calibration.calibration_text import required_ids, tell_shortened
from rqc.compiler.calibration.compensation import budgeted_ranks
from rqc.compiler.calibration.findings import Findings
from rqc.compiler.calibration.solver import Solver
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress, Silent
from rqc.compiler.passlist import frame, grids
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import attention_bytes, resident_bytes
from rqc.compiler.targets import onnx, tensorrt
from rqc.compiler.targets.grids import token_grid
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.passes.base import CLIP, Pass
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.errors import ResourceError, SchemeError

FACTOR_BYTES = 20
"""For each second moment: it and its factors while it is inverted."""
WEIGHT_BYTES = 48
"""For each weight while it is solved: itself, its codes, branch and errors, some in float64."""


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


def with_method(recipe: Recipe, merge: Merge | None, progress: Progress) -> Recipe:
    """The recipe with a method that fits: rounding to nearest for `auto` where there is no choice, which is said.

    Raises SchemeError where another is asked for and nothing is rounded, an adapter was trained on given codes, or one
    beside them has magnitudes.
    """
    obstacle = _obstacle(recipe, merge)
    if recipe.method == "auto" and (obstacle or recipe.scheme.small_floats or recipe.compensate == "loftq"):
        progress.line("method auto: rtn, there is no other here")
        return replace(recipe, method="rtn")
    if recipe.method != "rtn" and obstacle is not None:
        why, hint = obstacle
        raise SchemeError(f"--method {recipe.method} {why}", hint=hint)
    return recipe


def _obstacle(recipe: Recipe, merge: Merge | None) -> tuple[str, str] | None:
    """Why codes must be those of rounding to nearest, and the way out; None where they need not."""
    if not recipe.scheme.quantized:
        return (
            f"with --scheme {recipe.scheme}, which rounds no weights",
            "leave --method out, or take --scheme w4a16",
        )
    for part in () if merge is None else merge.parts:
        directory, basis = part.adapter.directory, part.adapter.basis
        if basis is not None and basis.grid is not None:
            return (
                f"gives the base other codes than those that {directory} was trained on",
                "--method rtn, by which it was trained",
            )
        if merge is not None and merge.how != FOLD and any(one.magnitude is not None for one in part.deltas.values()):
            return (
                f"with --merge {merge.how}: {directory} is a DoRA, which divides by the norms of the codes, and verify "
                "finds these again where they are rounded to nearest alone",
                "--method rtn, or --merge fold",
            )
    return None


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
    if ids is None:
        solve_by_weights(fresh.model, solver, lambda done, total: progress.advance("calibration", done, total))
        return found
    calibrate(
        fresh.model,
        ids,
        solver,
        lambda names: _deployed(recipe, fresh.description, found.of(names)),
        lambda node: _rounding(recipe, node),
        lambda done, total: progress.advance("calibration", done, total),
        crossed=_crosses(recipe),
    )
    return found


def _text(recipe: Recipe, imported: Imported, progress: Progress) -> NDArray[np.int64]:
    tokens = recipe.calibration_samples * recipe.calibration_length
    ids = required_ids(recipe, imported, tokens, f"{_asked(recipe)} looks at calibration text", "leave it out")
    tell_shortened(recipe, imported, ids, recipe.calibration_samples, progress)
    return ids


def _asked(recipe: Recipe) -> str:
    """The option for which something is measured."""
    if recipe.method == "gptq":
        return "--method gptq"
    return f"--compensate {recipe.compensate}" if recipe.compensate != "none" else f"--sparsity {recipe.sparsity}"


def calibration_need(recipe: Recipe, imported: Imported) -> int:
    """Bytes that `calibrated` will take: the text is read for it, no weight is. Raises InputError as it does."""
    return _needed(recipe, imported, _text(recipe, imported, Silent()) if calibrates(recipe) else None)


def _needed(recipe: Recipe, imported: Imported, ids: NDArray[np.int64] | None) -> int:
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
    needed = resident_bytes() + _needed(recipe, imported, ids)
    if needed > recipe.max_memory:
        shorter = "" if ids is None else "lower --calibration-length, "
        raise ResourceError(
            f"calibration takes about {needed / 2**30:.2f} GiB, --max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint=f"raise --max-memory, {shorter}or leave {_asked(recipe)} out",
        )


def weights_bytes(imported: Imported) -> int:
    """Of finding codes from weights alone: the widest weight some times over, and moments of its inputs."""
    description = imported.description
    shapes = [description.shape(claim) for claim in description.claims if claim.quantized]
    return max(WEIGHT_BYTES * n * k + FACTOR_BYTES * k**2 for n, k in shapes)


def calibration_bytes(imported: Imported, count: int, length: int, *, crossed: bool = False) -> int:
    """Of calibrating on `count` windows of `length`: a float block three times (made, stored, packed) with its
    activations, the text in front of it and behind it, the moments of what it reads (twice, if crossed), and the
    factors of the widest."""
    a, description = imported.description.architecture, imported.description
    layer = [claim for claim in description.claims if claim.layer == 0 and claim.quantized]
    widths = {claim.linear.reads: description.shape(claim)[1] for claim in layer}
    block = 3 * 4 * sum(prod(description.shape(claim)) for claim in layer)
    tokens = min(count, ROWS_AT_ONCE) * length
    step = tokens * 4 * (6 * a.hidden_size + 6 * a.intermediate_size) + attention_bytes(a, tokens, length)
    text = 2 * 4 * count * length * a.hidden_size
    moments = (16 if crossed else 8) * sum(width**2 for width in widths.values())
    return block + step + text + moments + FACTOR_BYTES * max(widths.values()) ** 2


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
