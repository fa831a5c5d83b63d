"""Ranges of activations on the calibration text, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.calibrate import run_parts
from rqc.compiler.calibration_text import calibration_ids
from rqc.compiler.importer import Imported
from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import block_bytes, resident_bytes
from rqc.passes.static_activations import Measure
from rqc.runtime.errors import CheckpointError, InputError, ResourceError

ROWS_AT_ONCE = 4
"""Windows of text in memory at a time: every input of a block's linears is, for all of their tokens."""


def ranges_on_text(recipe: Recipe, imported: Imported, progress: Progress) -> Measure:
    """A function that finds the largest magnitude of values on the calibration text that the recipe names."""

    def measure(model: ir.Model, names: Sequence[str]) -> dict[str, float]:
        ids = calibration_ids(recipe, imported, recipe.calibration_samples * recipe.calibration_length)
        if ids is None:
            raise InputError(
                f"--scheme {recipe.scheme} on {recipe.target} has static activation scales, "
                "which calibration text gives, and the model has no tokenizer.json",
                hint="add the tokenizer's files to the model directory, or take --scheme w4a8",
            )
        _check_memory(recipe, imported)
        if (asked := recipe.calibration_samples) > len(ids):
            progress.line(
                f"calibration: the text holds {len(ids)} windows of {ids.shape[1]} tokens, {asked} were asked for"
            )
        return largest(model, names, ids, lambda done: progress.advance("ranges", done, len(ids)))

    return measure


def _check_memory(recipe: Recipe, imported: Imported) -> None:
    """Raise ResourceError, before a weight is read, where measuring does not fit under --max-memory."""
    needed = resident_bytes() + block_bytes(imported, recipe, ROWS_AT_ONCE * recipe.calibration_length)
    if recipe.max_memory is not None and needed > recipe.max_memory:
        raise ResourceError(
            f"measuring the ranges of activations takes about {needed / 2**30:.2f} GiB, "
            f"--max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint="raise --max-memory, lower --calibration-length, or take --scheme w8a16, which measures nothing",
        )


def unmeasured(model: ir.Model, names: Sequence[str]) -> dict[str, float]:
    """Ranges of a dry run, which runs nothing."""
    return dict.fromkeys(names, 0.0)


def largest(
    model: ir.Model, names: Sequence[str], ids: NDArray[np.int64], told: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """max |x| of the named values over token ids [windows, length]. Raises CheckpointError if one is not finite."""
    found = dict.fromkeys(names, 0.0)
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = ids[start : start + ROWS_AT_ONCE]
        for _, values in run_parts(model, rows, watched=names):
            for name in found.keys() & values.keys():
                found[name] = max(found[name], float(np.abs(values[name]).max()))
                if not np.isfinite(found[name]):
                    raise CheckpointError(f"{name} is not finite on the calibration text", hint="repair the checkpoint")
        told(start + len(rows))
    return found
