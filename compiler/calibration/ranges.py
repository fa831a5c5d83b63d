"""Ranges of activations on the calibration text, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.calibration.blocks import inputs_of, partition, run_part
from rqc.compiler.calibration.calibration_text import required_ids, tell_shortened
from rqc.compiler.importer import Imported
from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.compiler.sizes import block_bytes, resident_bytes
from rqc.passes.static_activations import Measure, Statistic
from rqc.runtime.errors import CheckpointError, ResourceError

F32 = NDArray[np.float32]
CACHE_TOKENS = 16384
"""Tokens that ranges and means of a cache are taken from. SmolLM2's int8 cache, perplexity over a float one's: 1.0015
with those of 8,192, 1.0010 with those of 16,384."""
ROWS_AT_ONCE = 4
"""Windows of text whose inputs of a block's linears are in memory at a time; of all others, the block's own input."""


def ranges_on_text(recipe: Recipe, imported: Imported, progress: Progress) -> Measure:
    """A function that measures values on the calibration text that the recipe names."""

    def measure(model: ir.Model, names: Sequence[str], kind: Statistic = "largest") -> dict[str, F32]:
        asked = _windows(recipe)
        what, (instead, _) = _static(recipe)
        tokens = asked * recipe.calibration_length
        ids = required_ids(recipe, imported, tokens, f"{what}, which calibration text gives", f"take {instead}")
        _check_memory(recipe, imported, *ids.shape)
        tell_shortened(recipe, imported, ids, asked, progress)
        return measured(model, names, ids, kind, lambda done, total: progress.advance("ranges", done, total))

    return measure


def _windows(recipe: Recipe) -> int:
    """Windows of text to measure: for a cache no more than it takes."""
    enough = max(1, CACHE_TOKENS // recipe.calibration_length)
    return min(recipe.calibration_samples, enough) if recipe.target == "onnx" else recipe.calibration_samples


def _static(recipe: Recipe) -> tuple[str, tuple[str, str]]:
    """What is static, and what to take instead where nothing can be measured: another grid, or none."""
    if recipe.target == "onnx":
        what = "static scales" if recipe.kv_cache == "int8" else "keys from their mean"
        return f"--kv-cache {recipe.kv_cache} has {what}", ("--kv-cache float", "--kv-cache float")
    return f"--scheme {recipe.scheme} on {recipe.target} has static activation scales", (
        "--scheme w4a8",
        "--scheme w8a16",
    )


def _check_memory(recipe: Recipe, imported: Imported, count: int, length: int) -> None:
    """Raise ResourceError, before a weight is read, where measuring does not fit under --max-memory."""
    needed = resident_bytes() + range_bytes(recipe, imported, count, length)
    if recipe.max_memory is not None and needed > recipe.max_memory:
        raise ResourceError(
            f"measuring the ranges of activations takes about {needed / 2**30:.2f} GiB, "
            f"--max-memory is {recipe.max_memory / 2**30:.2f} GiB",
            hint=f"raise --max-memory, lower --calibration-length, or take {_static(recipe)[1][1]}: it needs no text",
        )


def range_bytes(recipe: Recipe, imported: Imported, count: int, length: int) -> int:
    """Of measuring on `count` windows of `length`: some of them in a block, all in front of it and behind it."""
    text = 2 * 4 * count * length * imported.description.architecture.hidden_size
    return text + block_bytes(imported, recipe, min(count, ROWS_AT_ONCE) * length, length)


def unmeasured(model: ir.Model, names: Sequence[str], kind: Statistic = "largest") -> dict[str, F32]:
    """Ranges of a dry run, which runs nothing."""
    return dict.fromkeys(names, np.zeros(1, np.float32))


def measured(
    model: ir.Model,
    names: Sequence[str],
    ids: NDArray[np.int64],
    kind: Statistic = "largest",
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, F32]:
    """max |x|, or the mean of x, in each channel of the named values over token ids [windows, length]; what none of
    them needs is not run. Raises CheckpointError if one is not finite."""
    parts, found = partition(model, names), {name: np.zeros(1) for name in names}
    last = max(index for index, part in enumerate(parts) if set(names) & set(part.outputs))
    text = [inputs_of(model, ids[start : start + ROWS_AT_ONCE]) for start in range(0, len(ids), ROWS_AT_ONCE)]
    for index, part in enumerate(parts[: last + 1]):
        needed = {name for later in parts[index + 1 : last + 1] for name in later.inputs}
        wanted = tuple(name for name in part.outputs if name in needed or name in found)
        for values in run_part(model, replace(part, outputs=wanted), text, needed):
            for name in found.keys() & values.keys():
                x = np.asarray(values[name], np.float64).reshape(-1, values[name].shape[-1])
                found[name] = found[name] + x.sum(0) if kind == "mean" else np.maximum(found[name], np.abs(x).max(0))
                if not np.isfinite(found[name]).all():
                    raise CheckpointError(f"{name} is not finite on the calibration text", hint="repair the checkpoint")
        told(index + 1, last + 1)
    tokens = ids.size if kind == "mean" else 1
    return {name: (total / tokens).astype(np.float32) for name, total in found.items()}
