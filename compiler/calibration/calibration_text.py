"""The tokens that a compile is calibrated on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.importer import Imported
from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.compiler.text import calibration_text, read_text, read_tokenizer, windows
from rqc.runtime.errors import CheckpointError


def calibration_ids(recipe: Recipe, imported: Imported, tokens: int, *, behind: int = 0) -> NDArray[np.int64] | None:
    """At most `tokens` token ids of the calibration text as windows [count, length]; None without a tokenizer.

    behind: leave out so many windows at the start, if the text is that long.
    """
    tokenizer = read_tokenizer(imported.checkpoint.directory)
    if tokenizer is None:
        return None
    text = calibration_text() if recipe.calibration is None else read_text(recipe.calibration)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    vocabulary = imported.description.architecture.vocab_size
    if max(ids, default=0) >= vocabulary:
        raise CheckpointError(
            f"{imported.checkpoint.directory}: tokenizer.json gives token {max(ids)}, the vocabulary has {vocabulary}",
            hint="tokenizer and weights are of different models; download both again",
        )
    length = min(recipe.calibration_length, imported.description.architecture.context_length, tokens)
    if len(ids) > (behind + 1) * length:
        ids = ids[behind * length :]
    cut = windows(ids, length, max(1, min(recipe.calibration_samples, tokens // length)))
    return np.asarray(cut, np.int64)


def tell_shortened(recipe: Recipe, imported: Imported, ids: NDArray[np.int64], asked: int, progress: Progress) -> None:
    """Say it where there are fewer windows than `asked`, or shorter ones than the recipe's."""
    count, length = ids.shape
    if count < asked:
        progress.line(f"calibration: the text holds {count} windows of {length} tokens, {asked} were asked for")
    if length < recipe.calibration_length:
        short = "context" if length == imported.description.architecture.context_length else "text"
        progress.line(
            f"calibration: windows have {length} tokens, {recipe.calibration_length} were asked for: the {short} is no "
            "longer"
        )
