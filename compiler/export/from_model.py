"""A GPTQ checkpoint of a model directory: rounded to 4 bits in symmetric groups by the compiler's own passes.

Only what folds into weights without a trace can be in it: R1, R2 and adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rqc.compiler.adapters.merge import FOLD
from rqc.compiler.adapters.reading import open_adapter
from rqc.compiler.adapters.survival import check_survival, fold_survival
from rqc.compiler.calibration.calibrated import calibrated, tell_unread
from rqc.compiler.calibration.device import on_device
from rqc.compiler.calibration.frames import choose
from rqc.compiler.calibration.methods import with_method
from rqc.compiler.export.checkpoint import ExportReport, GptqCheckpoint
from rqc.compiler.export.layout import ScaleRounding, Tensor, half, linear_tensors, misfit
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Instruments, Progress
from rqc.compiler.model_text import hash_of
from rqc.compiler.passlist import frame, grids
from rqc.compiler.recipe import Recipe
from rqc.compiler.tokenizer_files import TOKENIZER_FILES
from rqc.models.algebra import folded_norms
from rqc.models.checkpoint import model_directory, read_config
from rqc.models.description import Description
from rqc.models.quantized import forget
from rqc.models.weights import Weight
from rqc.passes.base import weight_of
from rqc.passes.quantize import quantized_of
from rqc.runtime.directories import Part
from rqc.runtime.errors import InputError, SchemeError, UnsupportedModelError

DEFAULTS = {"group_size": 128, "rotate": "none"}
FIXED = {"scheme": "w4a16", "embedding_bits": 16, "head_bits": 16}
"""What the format leaves no choice about."""
FOLDING = frozenset({"r1", "r2"})
"""Rotations that leave nothing to be computed online."""


def export_model(model_dir: Path, target: Path, options: Mapping[str, Any], progress: Progress) -> ExportReport:
    """Round a model to 4 bits and write it as a GPTQ checkpoint.

    options: those of a compile, by name, that a checkpoint leaves open; R1 unties embedding and head. Raises
    SchemeError (a rotation that has to be computed online, groups that do not divide), InputError,
    UnsupportedModelError (a family whose checkpoint packs its linears otherwise), ParityError (rounding leaves too
    little of an adapter in a linear), ResourceError (no space).
    """
    asked = Recipe.from_values({**DEFAULTS, **options, **FIXED})
    if asked.switchable:
        raise InputError("adapters with names, which a checkpoint cannot switch", hint="--adapter DIR without a name")
    hash_of(asked.calibration, model_directory(model_dir))  # must be sound, whether it is looked at or not
    imported = import_model(model_dir)
    recipe, merge = open_adapter(asked, imported, progress)
    recipe = with_method(_checked(recipe, imported), merge, progress)
    tell_unread(recipe, progress)
    if merge is not None and merge.how != FOLD:
        raise SchemeError(
            f"the adapter is merged by {merge.how}, which needs more than weights", hint="an adapter of a float base"
        )
    with on_device(recipe.device):
        choice = choose(recipe, imported, progress, merge)
        rotation, recipe = choice.rotation, replace(recipe, method=choice.method)
        findings = calibrated(recipe, imported, rotation, merge, progress)
    passes = [*frame(recipe, imported.description, rotation, merge), *grids(recipe, imported.description, findings)]
    Instruments(False, None, progress).run(imported.model, passes)
    survival = None if merge is None else fold_survival(imported.model, merge.folded, progress)
    check_survival(survival or {}, recipe.min_survival, "an engine with --merge branch")
    try:
        return _made(imported, recipe).write(target, survival=survival)
    finally:
        forget()


def _made(imported: Imported, recipe: Recipe) -> GptqCheckpoint:
    """The checkpoint of a quantized graph."""
    directory, rounding = imported.checkpoint.directory, ScaleRounding()
    tensors = [*_tensors(imported.model, recipe.group_size, rounding), *_neutral_norms(imported, recipe)]
    tied = imported.description.architecture.tied and recipe.tied == "keep"
    files = _companions(imported)
    return GptqCheckpoint(tensors, rounding, read_config(directory), recipe.group_size, tied, files)


def check_family(description: Description) -> None:
    """Raise UnsupportedModelError for a model whose checkpoint has other linears than its graph."""
    if description.family.sources or description.architecture.experts:
        raise UnsupportedModelError(
            f"a {description.architecture.model_type} checkpoint packs its linears otherwise than the graph",
            hint="run an engine instead: rqc compile",
        )


def _checked(recipe: Recipe, imported: Imported) -> Recipe:
    """The recipe with positive scales, and the head untied where R1 turns both ends apart. Raises for what the format
    cannot hold."""
    rotation = recipe.rotation
    if rotation is None or (online := sorted(rotation.sites - FOLDING)):
        raise SchemeError(
            f"rotation {'auto' if rotation is None else ', '.join(online)} leaves Hadamards to be computed online",
            hint="--rotate none, or a list of r1 and r2",
        )
    check_family(imported.description)
    if found := misfit(imported.description, recipe.group_size):
        raise SchemeError(found[0], hint=found[1] or "run an engine instead: rqc compile")
    apart = imported.description.architecture.tied and "r1" in rotation.sites
    return replace(recipe, positive=True, tied="untie" if apart else recipe.tied)


def _tensors(model: ir.Model, group_size: int, rounding: ScaleRounding) -> Iterator[Tensor]:
    """Everything that came from the checkpoint, in graph order: floats in float16, linears in four parts."""
    for name, value in model.graph.initializers.items():
        quantized, weight = quantized_of(value), weight_of(value)
        if quantized is not None and name.endswith(".codes"):
            stem = name.removesuffix(".weight.codes")
            yield from linear_tensors(stem, quantized.shape, group_size, quantized.get, rounding)
        elif quantized is None and weight is not None:
            yield Tensor(name, weight.shape, np.float16, partial(_half, name, weight))


def _half(name: str, weight: Weight) -> np.ndarray:
    return half(name, weight.float32())


def _neutral_norms(imported: Imported, recipe: Recipe) -> Iterator[Tensor]:
    """The gains of norms that R1 has folded into the weights behind them: the graph has none any more."""
    if recipe.rotation is None or "r1" not in recipe.rotation.sites:
        return
    a = imported.description.architecture
    for name in sorted(folded_norms(imported.description, head=True)):
        yield neutral_norm(name, a.hidden_size, imported.description)


def neutral_norm(name: str, size: int, description: Description) -> Tensor:
    """The gain of a norm that multiplies with nothing."""
    gain = 0 if description.family.offset_norms else 1
    return Tensor(name, (size,), np.float16, partial(np.full, size, gain, np.float16))


def _companions(imported: Imported) -> dict[str, Part]:
    directory = imported.checkpoint.directory
    wanted = (*TOKENIZER_FILES, "tokenizer.model", "generation_config.json")
    return {name: partial(_file, directory / name) for name in wanted if (directory / name).is_file()}


def _file(path: Path) -> list[bytes]:
    return [path.read_bytes()]
