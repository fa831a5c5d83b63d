"""The tokens that a compile is calibrated on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.importer import Imported
from rqc.compiler.instruments import Progress
from rqc.compiler.model_text import encoded, pieces_of
from rqc.compiler.recipe import Recipe
from rqc.compiler.text import read_tokenizer, windows
from rqc.runtime.errors import InputError


def required_ids(recipe: Recipe, imported: Imported, tokens: int, what: str, instead: str) -> NDArray[np.int64]:
    """`calibration_ids` for an option that cannot do without: what it is, as the subject of a sentence, and what can be
    done instead. Raises InputError without a tokenizer."""
    ids = calibration_ids(recipe, imported, tokens)
    if ids is None:
        raise InputError(
            f"{what}, and the model has no tokenizer.json",
            hint=f"add the tokenizer's files to the model directory, or {instead}",
        )
    return ids


def calibration_ids(recipe: Recipe, imported: Imported, tokens: int) -> NDArray[np.int64] | None:
    """At most `tokens` token ids of the calibration text as windows [count, length]; None without a tokenizer."""
    directory, architecture = imported.checkpoint.directory, imported.description.architecture
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        return None
    length = min(recipe.calibration_length, architecture.context_length, tokens)
    count = max(1, min(recipe.calibration_samples, tokens // length))
    pieces = pieces_of(recipe.calibration, directory)
    ids = encoded(tokenizer, pieces, directory, architecture.vocab_size, enough=count * length)
    return np.asarray(windows(ids, length, count), np.int64)


def divided(ids: NDArray[np.int64], tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of windows [count, length], those to fit to and behind them those of about `tokens` to score on, half of all at
    most; of a single window, its halves."""
    if len(ids) == 1 and ids.size > 1:
        ids = ids[:, : ids.size // 2 * 2].reshape(2, -1)
    scored = max(1, min(len(ids) // 2, tokens // ids.shape[1]))
    return ids[:-scored], ids[-scored:, :tokens]


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


def tell_few(what: str, recipe: Recipe, ids: NDArray[np.int64], tokens: int, progress: Progress) -> None:
    """Say it where the text is shorter than the `tokens` that something looks at, or than the recipe asks for."""
    wanted = min(tokens, recipe.calibration_samples * recipe.calibration_length)
    if ids.size < wanted // 2:  # windows are whole
        progress.line(f"{what}: the text holds {ids.size} tokens, {wanted} are looked at where there are so many")
