"""The frozen base on its grid: the codes that will be deployed, or those that LoftQ finds together with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from rqc.compiler.finetune.settings import Settings
from rqc.compiler.finetune.targets import Target
from rqc.compiler.instruments import Progress
from rqc.models.adapter_frames import frame_folds
from rqc.models.algebra import Array
from rqc.models.grid import Grid
from rqc.models.grid_linear import GridLinear
from rqc.models.loftq import LoftQ, loftq
from rqc.models.nf4 import NormalFloat
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.weights import Weight


def grid_of(settings: Settings) -> Grid | NormalFloat | None:
    """The grid of the frozen weights; None for floats."""
    return NormalFloat() if settings.base == "nf4" else settings.grid


def put_on_grid(
    model: nn.Module,
    linears: Sequence[Target],
    grid: Grid | NormalFloat,
    found: Mapping[str, LoftQ],
    progress: Progress,
) -> None:
    """Replace the linears of a folded model by packed ones: what LoftQ `found`, by path, or the nearest codes.

    Raises CheckpointError where a weight is not finite.
    """
    for done, target in enumerate(linears, 1):
        linear = model.get_submodule(target.path)
        assert isinstance(linear, nn.Linear)
        if (start := found.get(target.path)) is not None:
            packed = GridLinear.from_quantized(start.quantized, linear.bias)
        else:
            packed = GridLinear.from_linear(linear, grid)
        model.set_submodule(target.path, packed)
        progress.advance("quantizing the base", done, len(linears))


def find_starts(
    reference: Reference, targets: Sequence[Target], settings: Settings, progress: Progress
) -> dict[str, LoftQ]:
    """LoftQ of every target by its path. The model is not folded yet.

    The weights are those that a compile quantizes: folded in float64, without a cast in between.
    """
    grid = grid_of(settings)
    assert grid is not None
    found: dict[str, LoftQ] = {}
    for done, target in enumerate(targets, 1):
        weight = _folded(reference, target, settings.rotation)
        found[target.path] = loftq(weight, grid, settings.rank, settings.loftq_iterations, settings.scale)
        progress.advance("LoftQ", done, len(targets))
    return found


def _folded(reference: Reference, target: Target, rotation: Rotation) -> Array:
    """A module's weight [out, in], float64: the parts of a packed one in the order of their rows."""
    parts = sorted(target.parts.items(), key=lambda part: part[1].rows.start)
    weights = []
    for name, part in parts:
        folds = tuple(frame_folds(name, reference.description, rotation))
        weights.append(Weight(reference, name, tuple(part.weight.shape), folds=folds).read())
    return np.concatenate(weights)
