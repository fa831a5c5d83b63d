"""What calibration finds for a model in one frame: codes for every linear of the blocks, fitted to what they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.blockwise import ROWS_AT_ONCE, Round, Site, calibrate
from rqc.compiler.calibration_text import calibration_ids
from rqc.compiler.findings import Findings, Fit
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress
from rqc.compiler.merge import Merge
from rqc.compiler.passlist import frame, grids
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import resident_bytes
from rqc.compiler.targets import onnx, tensorrt
from rqc.compiler.targets.grids import token_grid
from rqc.models.description import Description
from rqc.models.gptq import Order, gptq
from rqc.models.grid import Grid, fake_quantize_activations, quantize
from rqc.models.moments import error_of
from rqc.models.packing import Quantized
from rqc.models.rotation import Rotation
from rqc.passes.base import CLIP, Pass
from rqc.passes.quantize import QuantizeLinears
from rqc.runtime.errors import CheckpointError, InputError, ResourceError, SchemeError

FACTOR_BYTES = 20
"""For each second moment: it and its factors while it is inverted."""


def calibrates(recipe: Recipe) -> bool:
    """Whether a compile by that recipe looks at what linears read."""
    return recipe.scheme.quantized and recipe.method == "gptq"


def with_method(recipe: Recipe, merge: Merge | None) -> Recipe:
    """The recipe with a method that fits: rounding to nearest for `auto` where there is no choice.

    Raises SchemeError where another is asked for and nothing is rounded, or an adapter was trained on given codes.
    """
    bases = [] if merge is None else [(part.adapter.directory, part.adapter.basis) for part in merge.parts]
    trained = [directory for directory, basis in bases if basis is not None and basis.grid is not None]
    if recipe.method == "auto" and (trained or not recipe.scheme.quantized):
        return replace(recipe, method="rtn")
    if recipe.method != "rtn" and not recipe.scheme.quantized:
        raise SchemeError(
            f"--method {recipe.method} with --scheme {recipe.scheme}, which rounds no weights",
            hint="leave --method out, or take --scheme w4a16",
        )
    if recipe.method != "rtn" and trained:
        raise SchemeError(
            f"--method {recipe.method} gives the base other codes than those that {trained[0]} was trained on",
            hint="--method rtn, by which it was trained",
        )
    return recipe


def calibrated(
    recipe: Recipe,
    imported: Imported,
    rotation: Rotation,
    merge: Merge | None,
    progress: Progress,
    ids: NDArray[np.int64] | None = None,
) -> Findings | None:
    """Run the model in its frame over the calibration text (`ids` if given) and fit codes to it; None where the recipe
    asks for nothing of the kind. Adapters count where they are folded; beside the grid they are left out.

    Raises InputError without a tokenizer, ResourceError where it does not fit under --max-memory, CheckpointError,
    naming the linear, for moments that are not finite.
    """
    if not calibrates(recipe):
        return None
    ids = _text(recipe, imported, progress) if ids is None else ids
    _check_memory(recipe, imported)
    fresh = import_model(imported.checkpoint.directory)
    for step in frame(recipe, fresh.description, rotation, merge):
        step(fresh.model)
    result = Findings(int(ids.size))
    solve = _Solver(recipe, fresh.description, result)
    calibrate(
        fresh.model,
        ids,
        solve,
        lambda: _deployed(recipe, fresh.description, result),
        lambda node: _rounding(recipe, node, solve.grids.grid),
        lambda done, total: progress.advance("calibration", done, total),
    )
    ratios = sorted(fit.error / fit.nearest for fit in result.fits.values() if fit.nearest)
    if ratios:
        middle = ratios[len(ratios) // 2]
        progress.line(
            f"calibration: {recipe.method} on {ids.size} tokens, error {middle:.2f} × that of rounding to nearest"
        )
    return result


def _text(recipe: Recipe, imported: Imported, progress: Progress) -> NDArray[np.int64]:
    ids = calibration_ids(recipe, imported, recipe.calibration_samples * recipe.calibration_length)
    if ids is None:
        raise InputError(
            f"--method {recipe.method} fits codes to calibration text, and the model has no tokenizer.json",
            hint="add the tokenizer's files to the model directory, or take --method rtn",
        )
    if (asked := recipe.calibration_samples) > len(ids):
        progress.line(
            f"calibration: the text holds {len(ids)} windows of {ids.shape[1]} tokens, {asked} were asked for"
        )
    return ids


def _check_memory(recipe: Recipe, imported: Imported) -> None:
    """Raise ResourceError, before a weight is read, where calibration does not fit under --max-memory."""
    if recipe.max_memory is None:
        return
    needed = resident_bytes() + calibration_bytes(imported, recipe)
    if needed > recipe.max_memory:
        raise ResourceError(
            f"calibration takes about {needed / 2**30:.2f} GiB, --max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint="raise --max-memory, lower --calibration-length, or take --method rtn, which measures nothing",
        )


def calibration_bytes(imported: Imported, recipe: Recipe) -> int:
    """A float block three times (made, stored, packed) with its activations, the text in front of it and behind it, the
    moments of what it reads, and the factors of the widest."""
    a, description = imported.description.architecture, imported.description
    layer = [claim for claim in description.claims if claim.layer == 0 and claim.quantized]
    widths = {claim.linear.reads: description.shape(claim)[1] for claim in layer}
    block = 3 * 4 * sum(prod(description.shape(claim)) for claim in layer)
    step = ROWS_AT_ONCE * recipe.calibration_length * 4 * (6 * a.hidden_size + 6 * a.intermediate_size)
    text = 2 * 4 * recipe.calibration_samples * recipe.calibration_length * a.hidden_size
    kept = 3 if recipe.scheme.quantizes_activations else 1
    moments = 8 * kept * sum(width**2 for width in widths.values())
    return block + step + text + moments + FACTOR_BYTES * max(widths.values()) ** 2


class _Solver:
    """Solves a site at a time: linears on one grid as one weight, for a row's codes depend on that row alone."""

    def __init__(self, recipe: Recipe, description: Description, result: Findings) -> None:
        self.recipe = recipe
        self.result = result
        self.grids = next(one for one in grids(recipe, description) if isinstance(one, QuantizeLinears))

    def __call__(self, site: Site) -> None:
        by_grid: dict[Grid, list[str]] = {}
        for name in site.weights:
            by_grid.setdefault(self.grids.grid_of(name), []).append(name)
        for grid, names in by_grid.items():
            try:
                self._solve(site, grid, names)
            except CheckpointError as error:
                raise CheckpointError(f"{names[0]}: {error.message}", hint=error.hint) from error

    def _solve(self, site: Site, grid: Grid, names: Sequence[str]) -> None:
        parts = [site.weights[name].read() for name in names]
        width = parts[0].shape[1]
        moments = site.moments.plain
        order = Order.of(moments, width if grid.group_size == -1 else grid.block(width))
        found = gptq(np.concatenate(parts), order, grid)
        first = 0
        for name, w in zip(names, parts, strict=True):
            codes = rows_of(found, slice(first, first + len(w)))
            first += len(w)
            self.result.codes[name] = codes
            self.result.fits[name] = _fit(w, codes, grid, order.moments)


def _fit(w: NDArray[np.float64], codes: Quantized, grid: Grid, moments: NDArray[np.float32]) -> Fit:
    plain = w.astype(np.float32)
    energy = float(error_of(plain, moments).sum()) or 1.0
    errors = [float(error_of(plain - one.dequantize(), moments).sum()) for one in (codes, quantize(w, grid))]
    return Fit(*(float(np.sqrt(error / energy)) for error in errors))


def rows_of(quantized: Quantized, rows: slice) -> Quantized:
    """Some rows of a quantized weight."""
    zeros = quantized.zero_points
    return replace(
        quantized,
        codes=quantized.codes[rows],
        scales=quantized.scales[rows],
        zero_points=None if zeros is None else zeros[rows],
    )


def _deployed(recipe: Recipe, description: Description, result: Findings) -> list[Pass]:
    """What makes of a float block what the engine computes; static ranges, which are found later, are left out."""
    target = onnx if recipe.target == "onnx" else tensorrt
    static = recipe.target != "onnx" and tensorrt.has_static_activations(recipe)
    return [
        *grids(recipe, description, result),
        *target.packing(recipe, description),
        *target.by_blocks(),
        *([] if static else target.activations(recipe)),
    ]


def _rounding(recipe: Recipe, node: ir.Node, grid: Grid) -> Round | None:
    """How what a linear reads is rounded, in the kernel or by the graph."""
    bits = recipe.scheme.activation_bits
    if bits >= 16:
        return None
    if bits == 8 and recipe.target == "onnx":
        return lambda x: fake_quantize_activations(x, grid.block(x.shape[-1]), bits)
    tokens = token_grid(recipe)
    return replace(tokens, clip=float(node.metadata_props.get(CLIP, tokens.clip))).round
