"""--activation-clip auto: the clip ratio of each tensor that linears read, searched on the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.adapters.merge import Merge
from rqc.compiler.calibration.blocks import run_parts
from rqc.compiler.calibration.calibration_text import required_ids, tell_few
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Progress
from rqc.compiler.passlist import frame
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import attention_bytes, resident_bytes
from rqc.compiler.targets.grids import token_grid
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.models.token_grid import TokenGrid
from rqc.passes.base import linears, weight_of
from rqc.runtime.errors import CheckpointError, ResourceError

F32 = NDArray[np.float32]
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Ratios that are tried; of equal ones the first counts."""
TOKENS = 1024
"""Tokens of the calibration text that ratios are searched on."""


def searched_clips(
    recipe: Recipe,
    imported: Imported,
    rotation: Rotation,
    merge: Merge | None,
    progress: Progress,
    *,
    measure: bool = True,
) -> Recipe:
    """The recipe with the ratios that are best in this frame, where it asks for `auto`; else as it is. The model runs
    in floats: adapters count where they are folded. measure: whether weights may be read; without, nothing is clipped.

    Raises InputError without a tokenizer, ResourceError where measuring does not fit under --max-memory,
    CheckpointError for values that are not finite.
    """
    if recipe.activation_clip != "auto":
        return recipe
    if not measure:
        progress.line("activation clip auto: a dry run searches nothing")
        return recipe
    recipe = replace(recipe, clips={})
    ids = _text(recipe, imported)
    tell_few("activation clip auto", recipe, ids, TOKENS, progress)
    _check_memory(recipe, imported, *ids.shape)
    fresh = import_model(imported.checkpoint.directory)
    for step in frame(recipe, fresh.description, rotation, merge):
        step(fresh.model)
    sites = sites_of(fresh.model, fresh.description)
    ratios = best_ratios(
        fresh.model, sites, ids, token_grid(recipe), lambda done: progress.advance("clips", done, len(sites))
    )
    found = sorted(ratios.values())
    progress.line(
        f"activation clip auto: {len(found)} tensors, {found[0]:g} to {found[-1]:g}, median {found[len(found) // 2]:g}"
        f" (on {ids.size} calibration tokens)"
    )
    return replace(recipe, clips={name: ratios[value] for value, names in sites.items() for name in names})


def _text(recipe: Recipe, imported: Imported) -> NDArray[np.int64]:
    what = "--activation-clip auto searches ratios on calibration text"
    return required_ids(recipe, imported, TOKENS, what, "give a ratio such as --activation-clip 0.9")


def _check_memory(recipe: Recipe, imported: Imported, count: int, length: int) -> None:
    """Raise ResourceError, before a weight is read, where the search does not fit under --max-memory."""
    if recipe.max_memory is None:
        return
    needed = resident_bytes() + search_bytes(imported, count, length)
    if needed > recipe.max_memory:
        raise ResourceError(
            f"searching clip ratios takes about {needed / 2**30:.2f} GiB, "
            f"--max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint="raise --max-memory, or give a ratio such as --activation-clip 0.9, which measures nothing",
        )


def search_bytes(imported: Imported, count: int, length: int) -> int:
    """The table or a block in floats three times (made, stored, packed), its activations, and one input at all times of
    the search: as it is, rounded, off, and what the weights make of that."""
    a, description = imported.description.architecture, imported.description
    shapes = [description.shape(claim) for claim in description.claims if claim.layer == 0 and claim.quantized]
    weights = max(sum(prod(shape) for shape in shapes), a.vocab_size * a.hidden_size)
    tokens = count * length
    activations = tokens * (6 * a.hidden_size + 10 * a.intermediate_size)
    return 4 * (3 * weights + activations + max(k for _, k in shapes) ** 2) + attention_bytes(a, tokens, length)


def sites_of(model: ir.Model, description: Description) -> dict[str, list[str]]:
    """Names of values, and the weights of the linears that will be quantized and read each."""
    quantized = {claim.weight for claim in description.claims if claim.quantized}
    sites: dict[str, list[str]] = {}
    for name, node in linears(model):
        if name in quantized and node.inputs[0] is not None:
            sites.setdefault(node.inputs[0].name or "", []).append(name)
    return sites


def best_ratios(
    model: ir.Model,
    sites: Mapping[str, Sequence[str]],
    ids: NDArray[np.int64],
    grid: TokenGrid,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """The ratio of each value for which its linears' outputs err least, over token ids [windows, length], in a graph of
    floats. Raises CheckpointError for a value that is not finite.
    """
    found: dict[str, float] = {}
    for _, values in run_parts(model, ids, watched=set(sites)):
        for name in sites.keys() & values.keys():
            x = np.asarray(values[name], np.float32)
            if not np.isfinite(x).all():
                raise CheckpointError(
                    f"{sites[name][0]}: what it reads is not finite on the calibration text",
                    hint="repair the checkpoint",
                )
            errors = output_errors(x.reshape(-1, x.shape[-1]), _weights(model, sites[name]), grid)
            found[name] = RATIOS[int(np.argmin(errors))]
            told(len(found))
        if len(found) == len(sites):
            break
    return found


def output_errors(x: F32, weights: Sequence[F32], grid: TokenGrid) -> list[float]:
    """Σ ‖W (x̂ − x)‖² over tokens x [tokens, K] and weights W [N, K] for every ratio.

    Ratios by Σ ‖x̂ − x‖² are as good on rotated SmolLM2 at w4a4 (perplexity up to 3 % above or below, by groups and zero
    points), where no channel stands out; by the share of each token's ‖W x‖² they are worse by 5 %.
    """
    rows = np.concatenate(weights)
    # the same by WᵀW where there are more outputs than inputs: fewer products
    gram = rows.T @ rows if len(rows) > x.shape[1] else None
    errors = []
    for ratio in RATIOS:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite where values are next to it: no ratio is better
            off = replace(grid, clip=ratio).round(x) - x
            left, right = (off @ rows.T,) * 2 if gram is None else (off @ gram, off)
            errors.append(float(np.multiply(left, right).sum(dtype=np.float64)))
    return errors


def _weights(model: ir.Model, names: Sequence[str]) -> list[F32]:
    """The weights [N, K] of linears, still floats."""
    weights = [weight_of(model.graph.initializers.get(name)) for name in names]
    return [weight.float32() for weight in weights if weight is not None]
