"""Adapters that start from EoRA's factors: what makes up best, on a text, for the error of the base on its grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rqc.compiler.finetune.grids import grid_of
from rqc.compiler.finetune.settings import Settings
from rqc.compiler.finetune.targets import Target, block_linears, chosen_targets
from rqc.compiler.instruments import Progress
from rqc.compiler.text import calibration_text, read_tokenizer, windows
from rqc.models.algebra import Array
from rqc.models.delta import Delta
from rqc.models.eora import eora
from rqc.models.grid import Grid, quantize
from rqc.models.moments import Moments
from rqc.models.nf4 import NormalFloat, quantize_levels
from rqc.models.reference import Reference
from rqc.runtime.errors import CheckpointError, InputError

WINDOWS, LENGTH = 32, 512
MOMENT_BYTES = 1 << 30
"""Second moments in memory at a time: the text is read again for each such share of the linears."""


def eora_starts(model_dir: str | Path, settings: Settings, progress: Progress) -> dict[str, Delta]:
    """The adapter of every target by its path: EoRA of W − Ŵ, Ŵ what is trained on, under the moments of what the
    float model reads there, in the basis that is trained in, on the calibration text that ships.

    The model is loaded for it, and gone afterwards. Raises InputError without a tokenizer, CheckpointError, naming the
    linear, where something is not finite.
    """
    reference, grid = Reference.load(model_dir), grid_of(settings)
    assert grid is not None
    ids = _text(Path(model_dir), reference)
    targets = chosen_targets(block_linears(reference), settings)
    reference.rotate(settings.rotation, tied=reference.description.architecture.tied)
    found: dict[str, Delta] = {}
    for share in _shares(targets):
        moments = _moments(reference, share, ids)
        for target in share:
            found[target.path] = _start(target, moments[target.path], grid, settings)
            progress.advance("EoRA", len(found), len(targets))
    return found


def _start(target: Target, moments: Moments, grid: Grid | NormalFloat, settings: Settings) -> Delta:
    w = _weight(target)
    rounded = quantize_levels(w, grid) if isinstance(grid, NormalFloat) else quantize(w, grid)
    try:
        delta = eora(w - rounded.dequantize(), moments.second, settings.rank)
    except CheckpointError as error:
        raise CheckpointError(f"{target.path}: {error.message}", hint=error.hint) from error
    return Delta(delta.a, delta.b / settings.scale, settings.scale)


def _weight(target: Target) -> Array:
    """The module's weight as folded, float64."""
    weight: Any = next(iter(target.parts.values())).linear.weight
    values: Array = weight.detach().double().numpy()
    return values


def _text(model_dir: Path, reference: Reference) -> NDArray[np.int64]:
    """Token ids [windows, length] of the text that ships."""
    tokenizer = read_tokenizer(model_dir)
    if tokenizer is None:
        raise InputError(
            "init eora measures what the linears read on a text, and the model has no tokenizer.json",
            hint="add the tokenizer's files to the model directory, or --init loftq",
        )
    ids = tokenizer.encode(calibration_text(), add_special_tokens=False).ids
    length = min(LENGTH, reference.description.architecture.context_length)
    return np.asarray(windows(ids, length, WINDOWS), np.int64)


def _shares(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """The targets in order, as many at a time as their moments have room for."""
    share: list[Target] = []
    left = MOMENT_BYTES
    for target in targets:
        needed = 8 * target.shape[1] ** 2
        if share and needed > left:
            yield share
            share, left = [], MOMENT_BYTES
        share.append(target)
        left -= needed
    yield share


def _moments(reference: Reference, targets: Sequence[Target], ids: NDArray[np.int64]) -> dict[str, Moments]:
    """What the targets read on the text, by path."""
    moments = {target.path: Moments(target.shape[1]) for target in targets}
    with _watched(reference, moments):
        for window in ids:
            reference.logits(window)
    return moments


@contextmanager
def _watched(reference: Reference, moments: dict[str, Moments]) -> Iterator[None]:
    """Add to the moments whatever the linears at these paths read, behind their online rotation."""
    handles = []
    for path, one in moments.items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], one: Moments = one, path: str = path) -> None:
            try:
                one.add(args[0].detach().float().numpy())
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error

        handles.append(reference.model.get_submodule(path).register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
